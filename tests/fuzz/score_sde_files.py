"""Damaged .pth files of score_sde_pytorch."""

from __future__ import annotations

import functools
import io
import random
import zlib
from typing import Any

import harness
import mutations
import torch
import unets

import ncsn_fast
from ncsn_fast import CheckpointError

NETWORKS = ("ncsnpp", "ncsnpp-skip", "ncsnpp-discrete", "ddpmpp", "ddpm")


@functools.cache
def corpus() -> tuple[Any, ...]:
    """Returns the contents of sound files."""
    return tuple(map(_as_published, NETWORKS))


def _as_published(name: str) -> dict[str, Any]:
    model = unets.model(name)
    state = {f"module.{key}": value for key, value in model.net.state_dict().items()}
    trained = [p.detach() for p in model.net.parameters() if p.requires_grad]
    return {
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "model": {"module.sigmas": model.sigmas.double(), **state},
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": trained},
        "step": 7,
    }


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    draw, file = random.Random(seed), io.BytesIO()
    contents, kind = draw.choice(corpus()), draw.random()
    if kind < 0.8:
        contents = mutations.damaged_tree(contents, draw)
    torch.save(contents, file)
    if kind > 0.9:
        return mutations.damaged_zip(file.getvalue(), draw)
    return mutations.damaged(file.getvalue(), draw) if kind > 0.8 else file.getvalue()


def check(content: bytes) -> dict[str, bool]:
    """Reads one file, with averaged or raw weights."""
    path = harness.folder() / "score_sde.pth"
    path.write_bytes(content)
    name = ("averaged", "averaged", "raw")[zlib.crc32(content) % 3]
    weights: Any = "raw" if name == "raw" else "ema"
    read = functools.partial(ncsn_fast.load, path, weights=weights)
    return {name: harness.reads(name, read, (CheckpointError,), path.name)}
