"""Samplers of the NCSN papers as programs: annealed Langevin and consistent annealed sampling."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ncsn_fast.diffusion.spacing import check_ladder
from ncsn_fast.samplers.program import Column, Program, table

# eta = 1 - ratio^CAS_EXPONENT reproduces the released CIFAR-10 step of consistent annealed sampling
# (eta = 5.6e-6 / 0.01^2 at ratio 0.9638).
CAS_EXPONENT = 1.563


def annealed_langevin(
    sigmas: ArrayLike,
    epsilon: float,
    n_steps_each: int,
    *,
    denoise: bool = True,
    form: Literal["code", "paper"] = "code",
) -> Program:
    """Returns annealed Langevin dynamics (Song & Ermon 2019 and 2020, algorithm 1 of both).

    At each sigma_i, T times: x + alpha_i s(x, sigma_i) + sqrt(2 alpha_i) z, where
    alpha_i = epsilon sigma_i^2 / sigma_L^2; then, with `denoise`, x + sigma_L^2 s(x, sigma_L), the
    last step of the 2020 paper. NFE = L T (+ 1).

    Args:
        sigmas: (L,) descending.
        epsilon: step size (the published step_lr).   n_steps_each: T.
        form: "paper" halves alpha: x + (alpha/2) s + sqrt(alpha) z, the formula printed in the 2019
            paper.
    """
    ladder = check_ladder(np.asarray(sigmas))
    if not 0 < epsilon < math.inf or n_steps_each < 0:
        raise ValueError(
            f"expected epsilon > 0 and n_steps_each >= 0; got {epsilon} and {n_steps_each}"
        )
    if form not in ("code", "paper"):
        raise ValueError(f"form must be 'code' or 'paper'; got {form!r}")
    sigma = np.repeat(ladder, n_steps_each)
    level = np.repeat(np.arange(len(ladder)), n_steps_each)
    alpha = epsilon * (sigma / ladder[-1]) ** 2 * (0.5 if form == "paper" else 1.0)
    b, c = alpha / sigma, np.sqrt(2 * alpha)
    if denoise:
        level = np.append(level, level[-1] + 1 if len(level) else 0)
        sigma = np.append(sigma, ladder[-1])
        b, c = np.append(b, ladder[-1]), np.append(c, 0.0)
    return table("ald", sigma, level, b=b, c=c)


def consistent_annealed(
    sigmas: ArrayLike, eta: float | None = None, *, denoise: bool = True
) -> Program:
    """Returns consistent annealed sampling on geometric levels (Jolicoeur-Martineau et al. 2021).

    x + eta sigma_i^2 s(x, sigma_i) + beta sigma_{i+1} z,  beta = sqrt(1 - ((1 - eta) / gamma)^2),
    gamma = sigma_{i+1} / sigma_i; no noise at the last level, where with `denoise` the step is
    sigma_L^2 s instead of eta sigma_L^2 s (one evaluation serves both). For data at a single point
    the variance is exactly sigma_i^2 at every level. NFE = L.

    Args:
        sigmas: (L,) descending and geometric.
        eta: epsilon / sigma_L^2, in [1 - gamma, 1 + gamma]; None for 1 - gamma^CAS_EXPONENT.
    """
    ladder = check_ladder(np.asarray(sigmas))
    gamma = _common_ratio(ladder)
    if eta is None:
        eta = 1 - gamma**CAS_EXPONENT if len(ladder) > 1 else 1.0
    if not 1 - gamma <= eta <= 1 + gamma:
        raise ValueError(
            f"eta must be in [1 - gamma, 1 + gamma] = [{1 - gamma:.4g}, {1 + gamma:.4g}]; "
            f"got {eta:.4g}"
        )
    beta = math.sqrt(max(0.0, 1 - ((1 - eta) / gamma) ** 2))
    b = eta * ladder
    c = np.append(beta * ladder[1:], 0.0)
    if denoise:
        b[-1] = ladder[-1]
    return table("cas", ladder, np.arange(len(ladder)), b=b, c=c)


def _common_ratio(ladder: Column) -> float:
    """Returns the ratio sigma_{i+1} / sigma_i of a geometric ladder; ValueError for any other."""
    ratio = (ladder[-1] / ladder[0]) ** (1 / max(len(ladder) - 1, 1))
    if len(ladder) > 1 and not np.allclose(ladder[1:] / ladder[:-1], ratio, rtol=1e-4):
        raise ValueError(
            "consistent annealed sampling needs a geometric ladder (one ratio of neighbours)"
        )
    return float(ratio)


def refine_ladder(sigmas: ArrayLike, n_sigma: int) -> Column:
    """Splits each step of a geometric ladder into n_sigma: (L - 1) n_sigma + 1 levels."""
    ladder = check_ladder(np.asarray(sigmas))
    if n_sigma < 1:
        raise ValueError(f"n_sigma must be at least 1; got {n_sigma}")
    _common_ratio(ladder)
    if n_sigma == 1:
        return ladder
    return np.geomspace(ladder[0], ladder[-1], (len(ladder) - 1) * n_sigma + 1)
