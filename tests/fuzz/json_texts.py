"""Damaged JSON: config.json of a model, settings.json of a folder, and records of likelihoods."""

from __future__ import annotations

import functools
import json
import random

import harness
import mutations
import tiny
from architectures import model as model_of

from ncsn_fast import CheckpointError
from ncsn_fast.checkpoints.model_folder import CONFIG_NAME, DIGEST, load_model_folder
from ncsn_fast.cli.sample_folder import SETTINGS_NAME, claim_folder
from ncsn_fast.data.json_file import find_json
from ncsn_fast.evaluation.bits_per_dim import Record

SETTINGS = {"model": "a" * 64, "dtype": "fp32", "seed": 1, "method": "ald", "steps": None}
RECORD = [{"index": i, "bpd": 2.5 + i, "nfe": 40} for i in range(3)]


@functools.cache
def corpus() -> tuple[dict[str, object], ...]:
    """Returns sound objects of every kind."""
    config = json.loads((_model() / CONFIG_NAME).read_text())
    time = model_of("unet_a").config.to_dict()
    return config, config, {k: v for k, v in config.items() if k != DIGEST}, time, SETTINGS


@functools.cache
def _model() -> object:
    return tiny.model().save_pretrained(harness.folder() / "model")


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    draw = random.Random(seed)
    if draw.random() < 0.2:
        lines = b"\n".join(
            mutations.damaged_json(line, draw) if draw.random() < 0.5 else json.dumps(line).encode()
            for line in RECORD
        )
        return mutations.damaged(lines, draw) if draw.random() < 0.5 else lines
    content = mutations.damaged_json(draw.choice(corpus()), draw)
    return mutations.damaged(content, draw) if draw.random() < 0.2 else content


def check(content: bytes) -> dict[str, bool]:
    """Reads one file as everything that is JSON."""
    model, place = _model(), harness.folder() / "settings"
    place.mkdir(exist_ok=True)
    for path in (model / CONFIG_NAME, place / SETTINGS_NAME, place / "bits.jsonl"):
        path.write_bytes(content)
    assert find_json(model / CONFIG_NAME) is None or content[:1] != b"["
    return {
        "config": harness.reads(
            CONFIG_NAME, lambda: load_model_folder(model), (CheckpointError,), "model"
        ),
        "settings": harness.reads(
            SETTINGS_NAME, lambda: claim_folder(place, SETTINGS, "samples drawn"), (ValueError,),
            "settings",
        ),
        "record": harness.reads("bits.jsonl", lambda: _figures(place / "bits.jsonl"), ()),
    }  # fmt: skip


def _figures(path: object) -> None:
    """Reads a record, and what is made of it."""
    found = Record(path).figures(range(3))
    assert found["bpd"]["n"] <= 3
    json.dumps(found, allow_nan=False)
