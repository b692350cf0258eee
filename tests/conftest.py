"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import drawing
import pytest
import tiny

from ncsn_fast import Sampler, ScoreModel
from ncsn_fast.engines import verdicts

if TYPE_CHECKING:
    from tensorrt_double import Behaviour

    from ncsn_fast.engines.tensorrt.builder import Settings

# Tests start other pytests. pytest-benchmark refuses to time anything where it finds this.
os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture(autouse=True)
def _checks_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines check their precision at every build: a test may have broken what passed before."""
    monkeypatch.setattr(verdicts, "remembered", lambda facts, check: check())


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, saved once; not to be changed."""
    return tiny.model().save_pretrained(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_folder(saved_tiny: Path, tmp_path: Path) -> Path:
    """A model folder."""
    return Path(shutil.copytree(saved_tiny, tmp_path / "model"))


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Context in which no file can grow beyond so many bytes: writing fails as on a full disk."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="module", params=["ncsnv2", "ncsn"])
def model(request: pytest.FixtureRequest) -> ScoreModel:
    """A tiny network of each kind."""
    return drawing.tiny(arch=request.param)


@pytest.fixture(scope="module", params=["eager", "cpu"])
def sampler(request: pytest.FixtureRequest, model: ScoreModel) -> Sampler:
    """Both engines on each of them."""
    return Sampler(model, engine=request.param, dtype="fp32", batch_size=3, threads=1)


@pytest.fixture(scope="module")
def plain() -> Sampler:
    """One of those."""
    return Sampler(drawing.tiny(), engine="cpu", dtype="fp32", batch_size=3, threads=1)


@pytest.fixture(params=("11.4", pytest.param("10.16", marks=pytest.mark.slow)))
def knobs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Behaviour:
    """A machine with TensorRT, as its double has it, and what can be made to fail there."""
    import trt_cases  # tests on a GPU do without its packages

    return trt_cases.install(monkeypatch, tmp_path, request.param)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of every build of a TensorRT engine, in order."""
    import trt_cases

    return trt_cases.count_builds(monkeypatch)
