"""The README, word for word: its commands and examples run, its figures are the measured ones."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
from paths import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def blocks(language: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line]
TRAIN = "python -m ncsn_fast.train"
CONVERT = next(command for command in COMMANDS if "ncsn_fast.convert" in command)
# One that reports and one that draws; all others are slow.
QUICK = ("python -m ncsn_fast.doctor", next(c for c in COMMANDS if "--out-dir samples/" in c))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: some photos, an authors' checkpoint, and the checkout's benchmarks."""
    where = tmp_path_factory.mktemp("reader")
    (where / "photos" / "summer").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), dtype=np.uint8)
    for i, photo in enumerate(pixels):
        Image.fromarray(photo).save(where / "photos" / "summer" / f"{i}.png")
    shutil.copy(golden.FOLDER / "ncsnv2_original.pth", where / "checkpoint.pth")
    (where / "benchmarks").symlink_to(ROOT / "benchmarks")
    return where


def test_make_commands_are_what_ci_runs() -> None:
    make = [command for command in COMMANDS if command.startswith("make ")]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert make == ["make demo", "make test"]
    assert {*make, "make test-all"} <= set(ci)


def run(command: str, folder: Path) -> None:
    """Runs a command as the reader does, in a process of its own."""
    # At full size the benchmarks take an hour: here each runs once, small.
    small = {"PYTEST_ADDOPTS": "--small"} if "benchmarks/" in command else {}
    if "cache clear" in command:  # not the engines of whoever runs the tests
        small["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(
        command.split(), cwd=folder, env=ENVIRONMENT | small, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in re.findall(r"--out (\S+)", command):
        assert (folder / name).stat().st_size > 0


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] * (command not in QUICK))
        for command in COMMANDS
        if command != TRAIN and command.split()[0] != "make"
    ],
)
def test_command_runs(command: str, folder: Path) -> None:
    if "--model model/" in command and not (folder / "model").exists():
        run(CONVERT, folder)
    run(command, folder)


@pytest.mark.slow
def test_training_with_no_options_starts_and_ctrl_c_saves(tmp_path: Path) -> None:
    assert TRAIN in COMMANDS
    process = subprocess.Popen(TRAIN.split(), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    while b" 3/2000" not in seen:  # the progress bar has reached the third step
        byte = process.stderr.read(1)
        assert byte, seen.decode()
        seen += byte
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130, rest.decode()[-2000:]
    assert list((tmp_path / "runs" / "digits" / "checkpoints").glob("step_*.pt"))


# What must hold after an example, by a line of it.
AFTER = {
    # Another micro-batch size may round differently; the samples are the same ones.
    "pictures = ": "assert images.shape == (16, 1, 16, 16) and len(pictures) == 4\n"
    "assert (again - images[12:]).abs().max() < 1e-3",
    "restore(": "assert found.shape == truth.shape and (found - truth).abs().mean() < 0.1",
    "wrap(": "assert images.shape == (4, 3, 32, 32) and model.score(images, 1.0).isfinite().all()",
    "describe()": "assert sampler.dtype == 'fp32' and sampler.plan(16).memory > 1e6",
}


@pytest.mark.slow
@pytest.mark.parametrize("example", blocks("python"))
def test_example_runs(example: str, tmp_path: Path) -> None:
    (check,) = (check for line, check in AFTER.items() if line in example)
    done = subprocess.run(
        [sys.executable, "-c", f"{example}\n{check}"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_figures_are_the_measured_ones() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "write_figures.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 0
