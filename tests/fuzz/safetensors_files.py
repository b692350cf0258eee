"""Damaged .safetensors files: weights of a model folder and of an extractor."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import harness
import mutations
import tiny
import torch

from ncsn_fast import CheckpointError
from ncsn_fast.checkpoints.model_folder import (
    CONFIG_NAME,
    DIGEST,
    WEIGHTS_NAME,
    load_model_folder,
)
from ncsn_fast.evaluation.features import DIGIT_FEATURES, DigitNet, _with_weights


@functools.cache
def corpus() -> tuple[bytes, ...]:
    """Returns sound files: of the model whose folder is `_folder`, and of the digits' extractor."""
    folder = tiny.model().save_pretrained(_folder())
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config[DIGEST]  # which would refuse every change
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return (folder / WEIGHTS_NAME).read_bytes(), DIGIT_FEATURES.read_bytes()


# What the parts of a tensor's entry in the header are replaced by.
ODD: dict[str, tuple[Any, ...]] = {
    "dtype": ("F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "C64", "X", "", None, 3),
    "shape": ([], [0], [1], [-1], [2**62, 4], [2**40, 2**40], None, "x", [1.5], [[1]]),
    "data_offsets": ([0, 0], [0, 2**62], [4, 0], [-4, 4], [0], None, [0, 1, 2], [0.5, 1]),
}


def _folder() -> object:
    return harness.folder() / "model"


def mutate(seed: int) -> bytes:
    """Makes a damaged file; most often its header alone is, and fits its length."""
    draw = random.Random(seed)
    content, kind = draw.choice(corpus()), draw.random()
    if kind < 0.3:
        return mutations.damaged(content, draw)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if kind < 0.5:
        text = mutations.damaged_json(header, draw)
    else:
        name = draw.choice([key for key in header if key != "__metadata__"])
        entry, header[name] = dict(header[name]), "@"
        for key, values in ODD.items():
            if draw.random() < 0.4:
                entry[key] = draw.choice(values)
        odd = mutations.damaged_json(entry, draw) if kind > 0.8 else json.dumps(entry).encode()
        text = json.dumps(header).encode().replace(b'"@"', odd)
    return len(text).to_bytes(8, "little") + text + content[end:]


def check(content: bytes) -> dict[str, bool]:
    """Reads one file as a model's weights and as an extractor's."""
    corpus()
    path = _folder() / WEIGHTS_NAME
    path.write_bytes(content)
    kinds = (CheckpointError,)

    def extractor() -> None:
        with torch.device("meta"):
            network = DigitNet()
        _with_weights(network, path)

    return {
        "model": harness.reads("model", lambda: load_model_folder(_folder()), kinds, "model"),
        "extractor": harness.reads("extractor", extractor, kinds, "model"),
    }
