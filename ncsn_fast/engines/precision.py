"""Precision check: compares an engine with the reference on noisy images over the noise levels."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.engines.base import Engine, EngineError, PrecisionError
from ncsn_fast.models.score import ScoreModel

# Allowed relative error of f for each dtype.
BOUNDS = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3}
_FLOP = 2.5e11  # work budget of the reference in a check: a second or two on a CPU
_MIN_LEVELS = 3


def probe_count(model: ScoreModel, flop: float) -> int:
    """Returns how many noise levels a check visits: all, or as many as its FLOP budget allows."""
    return int(
        np.clip(_FLOP / max(flop, 1.0), min(_MIN_LEVELS, len(model.sigmas)), len(model.sigmas))
    )


def probes(model: ScoreModel, n: int) -> tuple[Tensor, Tensor]:
    """Returns noisy photographs (n, C, H, W) float32 and their levels (n,) int64, evenly spread."""
    levels = torch.from_numpy(np.linspace(0, len(model.sigmas) - 1, n).round().astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([_crop(model.image_shape, generator) for _ in range(n)])
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    return images + model.sigmas.cpu()[levels][:, None, None, None] * noise, levels


def check_precision(engine: Engine, reference: Engine, n: int) -> float:
    """Returns the largest relative error of f against a reference engine, over n levels.

    Raises:
        PrecisionError: the error exceeds BOUNDS at some sigma.
        EngineError: the output of the reference itself is not finite.
    """
    x, levels = probes(engine.model, n)
    condition = engine.model.condition(engine.model.sigmas[levels.to(engine.model.device)])
    seen = None if condition is None else condition.cpu()
    expected, f = (e.output(x, seen).flatten(1) for e in (reference, engine))
    errors = ((f - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)).tolist()
    for i, error in enumerate(errors):
        sigma = float(engine.model.sigmas[levels[i]])
        if not bool(torch.isfinite(expected[i]).all()):
            raise EngineError(
                f"the model's own output is not finite at sigma {sigma:.4g}: its weights are "
                "damaged; load another checkpoint"
            )
        bound = BOUNDS[engine.dtype]
        if not error <= bound:
            other = "engine='eager'" if engine.dtype == "fp32" else "dtype='fp32'"
            raise PrecisionError(
                f"engine {engine.name!r} in {engine.dtype} differs from the reference by "
                f"{error:.2e} at sigma {sigma:.4g} (allowed: {bound:.0e}); use {other}"
            )
    return max(errors)


def _crop(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Crops a random square of a photograph and resizes it to (C, H, W) in [0, 1]."""
    channels, height, width = shape
    photo = _photographs()[int(torch.randint(2, (), generator=generator))]
    side = min(photo.size)
    left = int(torch.randint(photo.width - side + 1, (), generator=generator))
    square = photo.crop((left, 0, left + side, side)).resize((width, height), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return pixels[torch.arange(channels) % 3]


@functools.cache
def _photographs() -> list[Image.Image]:
    """Loads the two sample photographs of scikit-learn, without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    return [Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]
