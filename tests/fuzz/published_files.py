"""Damaged .pth files: published checkpoints of every family, and weights of extractors."""

from __future__ import annotations

import functools
import io
import random
import zlib
from collections.abc import Callable
from typing import Any

import harness
import mutations
import torch
from architectures import model as model_of

import ncsn_fast
from ncsn_fast import CheckpointError, ScoreModel
from ncsn_fast.evaluation.features import DigitNet, _with_weights


def _as_published(model: ScoreModel) -> Any:
    """Returns what the authors would have saved."""
    state = model.net.state_dict()
    if model.clock is not None:
        return {f"module.{key}": value for key, value in state.items()}
    raw = {f"module.{key}": value for key, value in state.items()}
    if not model.conditional:
        raw["module.sigmas"] = model.sigmas
    return [raw, {"state": {}, "param_groups": [{"lr": 1e-3}]}, 3, 1234, dict(state)]


@functools.cache
def corpus() -> tuple[Any, ...]:
    """Returns the contents of sound files."""
    models = [model_of(arch) for arch in ("ncsnv2", "ncsn", "ncsnv2", "unet_a", "unet_b")]
    published = [_as_published(model) for model in models]
    published[2] = published[2][:2]
    return (*published, DigitNet().state_dict())


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    draw, file = random.Random(seed), io.BytesIO()
    contents, kind = draw.choice(corpus()), draw.random()
    if kind < 0.75:
        contents = mutations.damaged_tree(contents, draw)
    new = kind > 0.85 or draw.random() < 0.8
    torch.save(contents, file, _use_new_zipfile_serialization=new)
    if kind > 0.85:
        return mutations.damaged_zip(file.getvalue(), draw)
    return mutations.damaged(file.getvalue(), draw) if kind > 0.75 else file.getvalue()


def check(content: bytes) -> dict[str, bool]:
    """Reads one file as a model, with averaged or raw weights, or as an extractor's weights."""
    path = harness.folder() / "published.pth"
    path.write_bytes(content)

    def extractor() -> None:
        with torch.device("meta"):
            network = DigitNet()
        _with_weights(network, path)

    readers: dict[str, Callable[[], Any]] = {
        "averaged": lambda: ncsn_fast.load(path),
        "raw": lambda: ncsn_fast.load(path, weights="raw"),
        "extractor": extractor,
    }
    name = ("averaged", "averaged", "raw", "extractor")[zlib.crc32(content) % 4]
    return {name: harness.reads(name, readers[name], (CheckpointError,), path.name)}
