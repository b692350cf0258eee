"""Damaged .npz files of reference statistics, and the distance that is computed from them."""

from __future__ import annotations

import functools
import io
import math
import random
from types import SimpleNamespace
from typing import Any, cast

import harness
import mutations
import numpy as np

from ncsn_fast.evaluation.features import Extractor
from ncsn_fast.evaluation.metrics import Statistics, statistics_distance
from ncsn_fast.evaluation.statistics_file import load_statistics, save_statistics

WIDTH = 4
EXTRACTOR = cast(Extractor, SimpleNamespace(name="corner", num_features=WIDTH, sha256="a" * 64))


@functools.cache
def corpus() -> tuple[Statistics, bytes]:
    """Returns sound statistics, and their file."""
    features = np.random.default_rng(0).normal(size=(50, WIDTH))
    good = Statistics(features.mean(0), np.cov(features, rowvar=False), 50)
    path = harness.folder() / "good.npz"
    save_statistics(path, good, EXTRACTOR)
    return good, path.read_bytes()


def mutate(seed: int) -> bytes:
    """Makes a damaged file."""
    draw = random.Random(seed)
    content, kind = corpus()[1], draw.random()
    if kind < 0.2:
        return mutations.damaged(content, draw)
    if kind < 0.4:
        return mutations.damaged_zip(content, draw)
    with np.load(io.BytesIO(content)) as archive:
        entries: dict[str, Any] = {name: archive[name] for name in archive.files}
    for _ in range(draw.choice((1, 1, 1, 2))):
        name = draw.choice(list(entries))
        if draw.random() < 0.9:
            entries[name] = mutations.odd_array(entries[name], draw)
        else:
            entries[draw.choice(("mu", "sigma", "n", "x"))] = entries.pop(name)
    file = io.BytesIO()
    (np.savez_compressed if draw.random() < 0.3 else np.savez)(file, **entries)
    return file.getvalue()


def check(content: bytes) -> dict[str, bool]:
    """Reads one file."""
    path = harness.folder() / "statistics.npz"
    path.write_bytes(content)

    def distance() -> None:
        found = statistics_distance(load_statistics(path, EXTRACTOR), corpus()[0])
        if not (math.isfinite(found) and found >= 0):
            raise ArithmeticError(f"a distance of {found}")

    return {"statistics": harness.reads("statistics", distance, (ValueError,), path.name)}
