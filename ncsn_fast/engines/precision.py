"""Precision check: compares an engine with the reference on noisy images over the noise levels.

The reference is plain PyTorch in float32. Some networks amplify its own rounding errors beyond the
bound (hardly trained ones, whose norms divide by small variances). There both are compared with
float64, and the engine may have a small multiple of the reference's error.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.diffusion.parameterisation import Parameterisation
from ncsn_fast.engines.base import DamagedModelError, Engine, PrecisionError
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.probe_images import probe_images
from ncsn_fast.models.score import ScoreModel

# Allowed relative error of f for each dtype.
BOUNDS = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3}
# Allowed multiple of the largest float32 error, where that exceeds the bound. Summing in another
# order gives errors of similar size on other images: at most 3 times larger in 12 untrained models.
_FLOAT32_MULTIPLE = 4.0
_EXACT_IMAGES = 16  # images computed in float64, which is slow: those with the largest errors
_FLOP = 2.5e11  # work budget of the reference in a check: a second or two on a CPU
_MIN_LEVELS = 3


def probe_count(model: ScoreModel, flop: float) -> int:
    """Returns how many noise levels a check visits: all, or as many as its FLOP budget allows."""
    return int(
        np.clip(_FLOP / max(flop, 1.0), min(_MIN_LEVELS, len(model.sigmas)), len(model.sigmas))
    )


def probes(model: ScoreModel, n: int) -> tuple[Tensor, Tensor]:
    """Returns noisy images (n, C, H, W) float32 and their levels (n,) int64, evenly spread."""
    levels = torch.from_numpy(np.linspace(0, len(model.sigmas) - 1, n).round().astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([_crop(model.image_shape, generator) for _ in range(n)])
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    return images + model.sigmas.cpu()[levels][:, None, None, None] * noise, levels


def check_precision(engine: Engine, reference: EagerEngine, n: int) -> float:
    """Returns the largest relative error of f against a reference engine, over n levels.

    If an fp32 engine exceeds its bound, the largest errors are measured again against float64.

    Raises:
        PrecisionError: the error is too large at some sigma.
        DamagedModelError: the output of the reference itself is not finite.
    """
    x, levels = probes(engine.model, n)
    sigmas = engine.model.sigmas[levels.to(engine.model.device)]
    seen, own = (
        None if condition is None else condition.cpu()
        for condition in (reference.condition(sigmas), engine.condition(sigmas))
    )
    noisy, known = x, engine.model.parameterisation
    x = _input(known, noisy, sigmas)
    expected = reference.output(x, seen)
    if engine.gives_scaled_score:
        f = engine.output(noisy, own)
        expected = _scaled_score(known, noisy, sigmas, expected)
    else:
        f = engine.output(x, own)
    for sigma, values in zip(sigmas.tolist(), expected, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise DamagedModelError(
                f"the model's own output is not finite at sigma {sigma:.4g}: its weights are "
                "damaged; load another checkpoint"
            )
    bound = BOUNDS[engine.dtype]
    errors = relative_error(f, expected)
    if engine.dtype == "fp32" and not bool((errors <= bound).all()):
        worst = errors.argsort(descending=True)[:_EXACT_IMAGES]
        exact = reference.exact(x[worst], None if seen is None else seen[worst])
        if engine.gives_scaled_score:
            exact = _scaled_score(known, noisy[worst].double(), sigmas[worst], exact)
        errors[worst] = relative_error(f[worst], exact)
        bound = max(bound, _FLOAT32_MULTIPLE * float(relative_error(expected[worst], exact).max()))
    for sigma, error in zip(sigmas.tolist(), errors.tolist(), strict=True):
        if not error <= bound:
            raise PrecisionError(
                f"engine {engine.name!r} in {engine.variant} differs from the reference by "
                f"{error:.2e} at sigma {sigma:.4g} (allowed: {bound:.0e})",
                "use engine='eager'" if engine.dtype == "fp32" else "use dtype='fp32'",
            )
    return float(errors.max())


def _input(known: Parameterisation, x: Tensor, sigmas: Tensor) -> Tensor:
    """Returns the network's input for noisy images x (N, C, H, W)."""
    form = known.linear_form(sigmas.cpu())
    scale, shift = (c.float().view(-1, 1, 1, 1) for c in (form.scale, form.shift))
    return scale * x + shift


def _scaled_score(known: Parameterisation, x: Tensor, sigmas: Tensor, f: Tensor) -> Tensor:
    """Returns sigma * score from the network's output f."""
    form = known.linear_form(sigmas.cpu())
    skip, out, const = (c.to(f.dtype).view(-1, 1, 1, 1) for c in form[:3])
    return skip * x + out * f + const


def relative_error(f: Tensor, expected: Tensor) -> Tensor:
    """Returns |f - expected| / |expected| of each image, (N,) float64."""
    f, expected = f.double().flatten(1), expected.double().flatten(1)
    return (f - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)


def _crop(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Crops a random square of a probe image and resizes it to (C, H, W) in [0, 1]."""
    channels, height, width = shape
    photo = probe_images()[int(torch.randint(2, (), generator=generator))]
    side = min(photo.size)
    left = int(torch.randint(photo.width - side + 1, (), generator=generator))
    square = photo.crop((left, 0, left + side, side)).resize((width, height), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return pixels[torch.arange(channels) % 3]
