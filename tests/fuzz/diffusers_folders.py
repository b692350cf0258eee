"""Damaged descriptions of diffusers' networks and schedulers."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import diffusers
import harness
import mutations
import torch

import ncsn_fast
from ncsn_fast import CheckpointError

_BETWEEN = b"\0"  # the two files, which are text
_SCHEDULERS = (diffusers.DDPMScheduler, diffusers.ScoreSdeVeScheduler, diffusers.EDMEulerScheduler)


@functools.cache
def corpus() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a sound network's description, and those of schedulers; its weights are written."""
    folder = harness.folder()
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    net.save_pretrained(folder / "unet")
    schedulers = []
    for kind in _SCHEDULERS:
        kind().save_pretrained(folder / "scheduler")
        text = (folder / "scheduler" / "scheduler_config.json").read_text()
        schedulers.append(json.loads(text))
    return json.loads((folder / "unet" / "config.json").read_text()), schedulers


def mutate(seed: int) -> bytes:
    """Makes the text of a network's description and of a scheduler's, one of them damaged."""
    draw = random.Random(seed)
    network, schedulers = corpus()
    scheduler = draw.choice(schedulers)
    if draw.random() < 0.5:
        return mutations.damaged_json(network, draw) + _BETWEEN + json.dumps(scheduler).encode()
    return json.dumps(network).encode() + _BETWEEN + mutations.damaged_json(scheduler, draw)


def check(content: bytes) -> dict[str, bool]:
    """Reads one folder."""
    corpus()
    folder = harness.folder()
    network, scheduler = content.split(_BETWEEN)
    (folder / "unet" / "config.json").write_bytes(network)
    (folder / "scheduler" / "scheduler_config.json").write_bytes(scheduler)
    read = functools.partial(ncsn_fast.load, folder)
    return {"model": harness.reads("model", read, (CheckpointError,), str(folder))}
