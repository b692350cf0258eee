"""Program transformations for editing: known pixels (both published ways), later starts."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from ncsn_fast.ops.noise import check_integer
from ncsn_fast.samplers.procedure import Procedure
from ncsn_fast.samplers.program import Column, Program

InpaintVariant = Literal["ncsnv2", "ncsn"]


def inpainting(
    program: Program, variant: InpaintVariant = "ncsnv2", *, restore: bool = True
) -> Program:
    """Returns the program with rows that impose known pixels.

    "ncsnv2" (released code of 2020): before every evaluation, known pixels become x_ref + sigma z
    with fresh z. "ncsn" (paper and code of 2019): z is drawn once per level, and known pixels are
    imposed before the level's first step and after each of its steps.

    Args:
        restore: set known pixels to x_ref exactly after the last row. Otherwise they stay as the
            last row leaves them ("ncsnv2") or at x_ref + sigma_L z ("ncsn"), as in the published
            code.
    """
    k = program.nfe
    before_row = np.append(program.sigma, math.nan)
    if variant == "ncsnv2":
        step = np.arange(k + 1)
    elif variant == "ncsn":
        first_of_level = np.searchsorted(program.level, program.level)
        step = np.append(first_of_level, first_of_level[-1] if k else 0)
        if k:
            before_row[-1] = program.sigma[-1]
    else:
        raise ValueError(f"inpainting variant must be 'ncsnv2' or 'ncsn'; got {variant!r}")
    if restore:
        before_row[-1] = 0.0
    return dataclasses.replace(
        program, reference_noise=before_row, reference_step=step.astype(np.int64)
    )


def start_level(ladder: Column, sigma: float | None, strength: float | None) -> float:
    """Returns the level of a ladder (L,) to start at, nearest to sigma or to a fraction `strength`.

    `strength` is the fraction of the way up in log sigma, in which distances are measured too.
    Raises ValueError unless exactly one of them is given and lies within the ladder.
    """
    if (sigma is None) == (strength is None):
        raise ValueError("give either sigma, the noise level to start at, or strength")
    if strength is not None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1]; got {strength}")
        sigma = float(ladder[-1] * (ladder[0] / ladder[-1]) ** strength)
    elif not ladder[-1] * (1 - 1e-6) <= cast(float, sigma) <= ladder[0] * (1 + 1e-6):
        raise ValueError(
            f"sigma must be on the model's ladder, from {ladder[-1]:.4g} to {ladder[0]:.4g}; "
            f"got {sigma}"
        )
    return float(ladder[np.abs(np.log(ladder) - math.log(cast(float, sigma))).argmin()])


def check_draws_noise(program: Program | Procedure) -> None:
    """Raises ValueError for a sampler without noise.

    Frames of an interpolation share their start, so without noise they would all be one image.
    """
    if program.nfe != 1 and not program.draws_noise:
        raise ValueError(
            f"interpolation mixes the noise of steps, and {program.name!r} draws none with these "
            "options; take ald, cas, ancestral or dpmpp, or give it churn or eta"
        )


def interpolation_weights(n_frames: int) -> Tensor:
    """Returns weights (n_frames, 2), cos and sin of angles from 0 to pi/2.

    Every frame's noise has variance 1.
    """
    n_frames = check_integer("n_frames", n_frames, least=1)
    angle = torch.linspace(0, math.pi / 2, n_frames, dtype=torch.float64)
    return torch.stack((angle.cos(), angle.sin()), dim=1).to(torch.float32)
