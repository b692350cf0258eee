"""Damaged checkpoints of a training run: reading one, resuming from it, and its next step."""

from __future__ import annotations

import functools
import io
import random
import zlib
from typing import Any

import harness
import mutations
import tiny
import torch

from ncsn_fast import CheckpointError
from ncsn_fast.checkpoints.training_run import read_run_file
from ncsn_fast.train import check_same_data, check_same_run
from ncsn_fast.training.trainer import DivergedError, Trainer, TrainingError

CONFIG = {"ema": 0.9, "threads": 1}


@functools.cache
def _trainer() -> Trainer:
    return tiny.trainer(**CONFIG)


@functools.cache
def corpus() -> dict[str, Any]:
    """Returns the contents of a sound checkpoint, after a step."""
    made = tiny.trainer(**CONFIG)
    made.n_images = len(tiny.IMAGES)
    made.train_step(tiny.IMAGES[:8])
    return made.state_dict()


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    draw, file = random.Random(seed), io.BytesIO()
    kind = draw.random()
    contents = corpus() if kind > 0.8 else mutations.damaged_tree(corpus(), draw)
    torch.save(contents, file)
    if kind > 0.9:
        return mutations.damaged_zip(file.getvalue(), draw)
    return mutations.damaged(file.getvalue(), draw) if kind > 0.8 else file.getvalue()


def check(content: bytes) -> dict[str, bool]:
    """Reads one file, as a model or as a run that goes on."""
    path = harness.folder() / "step_00000001.pt"
    path.write_bytes(content)
    kinds = (CheckpointError, TrainingError, DivergedError)  # the last of what the numbers give
    if zlib.crc32(content) % 2:
        return {"resume": harness.reads("resume", lambda: _resume(path), kinds)}
    model = harness.reads("model", lambda: read_run_file(path).model(), kinds[:1], path.name)
    return {"model": model}


def _resume(path: Any) -> None:
    """What `train --resume` does with a checkpoint."""
    saved, trainer = read_run_file(path), _trainer()
    check_same_run(trainer.config, saved.train_config, path.parent)
    if saved.model_config != trainer.model.config:
        raise TrainingError("another network")
    trainer.load_state_dict(saved.contents)
    check_same_data(len(tiny.IMAGES), saved.contents.get("n_images"), path.parent)
    trainer.train_step(tiny.IMAGES[:8])
    trainer.learning_rate()
