"""Damaged JSON: config.json and fast_table.json of a model, settings.json of a folder, a search.

And records of likelihoods.
"""

from __future__ import annotations

import functools
import json
import random

import harness
import mutations
import numpy as np
import tiny
from architectures import model as model_of

from ncsn_fast import CheckpointError
from ncsn_fast.checkpoints.model_folder import (
    CONFIG_NAME,
    DIGEST,
    TABLE_NAME,
    load_model_folder,
    read_table,
)
from ncsn_fast.cli.sample_folder import SETTINGS_NAME, claim_folder
from ncsn_fast.data.json_file import find_json
from ncsn_fast.evaluation.bits_per_dim import Record
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.samplers.few_step import tuned
from ncsn_fast.training.table_search import Journal

SETTINGS = {"model": "a" * 64, "dtype": "fp32", "seed": 1, "method": "ald", "steps": None}
FACTS = {"loss": "energy", "before": [0.1, 0.2], "after": [0.1, 0.1], "references": "ald"}
TABLE = TunedTable((5.0, 1.0, 0.01), (1.0, 4.0), (1.0, 0.5), 1.01, (1, 8, 8), facts=FACTS).to_dict()
SEARCH = {
    "version": 1, "settings": SETTINGS, "seconds": 1.5, "losses": [1.0, 2.5], "values": {"a": [1.0]}
}  # fmt: skip
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
    if seed % 4 == 3:  # of tune
        return mutations.damaged_json(draw.choice((TABLE, SEARCH)), draw)
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
    for name in (SETTINGS_NAME, TABLE_NAME, "search.json", "bits.jsonl"):
        (place / name).write_bytes(content)
    (model / CONFIG_NAME).write_bytes(content)
    assert find_json(model / CONFIG_NAME) is None or content[:1] != b"["
    return {
        "config": harness.reads(
            CONFIG_NAME, lambda: load_model_folder(model), (CheckpointError,), "model"
        ),
        "settings": harness.reads(
            SETTINGS_NAME, lambda: claim_folder(place, SETTINGS, "samples drawn"), (ValueError,),
            "settings",
        ),
        "table": harness.reads(TABLE_NAME, lambda: _run_table(place), (CheckpointError,), "table"),
        "search": harness.reads(
            "search.json", lambda: Journal.open(place / "search.json", SETTINGS), (ValueError,),
            "search.json",
        ),
        "record": harness.reads("bits.jsonl", lambda: _figures(place / "bits.jsonl"), ()),
    }  # fmt: skip


def _figures(path: object) -> None:
    """Reads a record, and what is made of it."""
    found = Record(path).figures(range(3))
    assert found["bpd"]["n"] <= 3
    json.dumps(found, allow_nan=False)


def _run_table(folder: object) -> None:
    """Reads a table, and builds the sampler that it is."""
    table = read_table(_sound(), folder)
    program = tuned(table)
    for column in (program.a, program.b, program.c, program.g):
        if not np.isfinite(column).all():
            raise ArithmeticError(f"a table of {column}")


@functools.cache
def _sound() -> object:
    return tiny.model()
