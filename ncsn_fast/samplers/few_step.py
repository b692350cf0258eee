"""Samplers of few steps as tables: Euler's and Heun's methods, DPM-Solver++(2M), and `fast`.

All solve the probability flow dx / dsigma = -sigma s(x, sigma) down a ladder and, with the denoise,
from its last level to 0, where the denoiser D = x + sigma f stands (f = sigma * score, program.py).
The history h holds what a method remembers of the row before: Heun's first slope, or D.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from ncsn_fast.samplers.program import Column, Program, table
from ncsn_fast.samplers.reverse_sde import steps_of

FAST_STEPS, FAST_ETA = 30, 4.0  # levels of `fast`, and the noise of its steps


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise that first raises a step's sigma to (1 + gamma) sigma (EDM's algorithm 2).

    Attributes:
        amount: S_churn; gamma = min(S_churn / N, sqrt(2) - 1) for N steps; 0 for none.
        s_min, s_max: the sigmas where it acts, in the units of the ladder.   s_noise: its scale.
    """

    amount: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.s_noise < math.inf):
            raise ValueError(
                f"churn and s_noise must be at least 0; got {self.amount} and {self.s_noise}"
            )
        if not 0 <= self.s_min <= self.s_max:
            raise ValueError(f"expected 0 <= s_min <= s_max; got {self.s_min} and {self.s_max}")

    def raised(self, sigma: Column) -> Column:
        """(1 + gamma) sigma, (N,)."""
        gamma = min(self.amount / len(sigma), math.sqrt(2) - 1)
        return np.where((self.s_min <= sigma) & (sigma <= self.s_max), sigma * (1 + gamma), sigma)


def euler(sigmas: ArrayLike, *, churn: Churn | None = None, denoise: bool = True) -> Program:
    """Euler's method on the flow: x + (sigma_i - sigma_{i+1}) f, which is DDIM's step.

    NFE = L, or L - 1 without the denoise. `heun` says how churn enters.

    Args:
        sigmas: (L,) descending.
    """
    sigma, after, noise = _churned(sigmas, churn or Churn(), denoise)
    level = np.arange(len(sigma))
    return table("euler", sigma, level, b=sigma - after, c=noise, initial="prior")


def heun(sigmas: ArrayLike, *, churn: Churn | None = None, denoise: bool = True) -> Program:
    """Heun's method (EDM: Karras et al. 2022, algorithms 1 and 2), NFE = 2 L - 1, or 2 L - 2.

    A step is two rows: x' = x + Delta f and, at sigma_{i+1}, x' + Delta (f' - f) / 2, with
    Delta = sigma_i - sigma_{i+1}; the step to 0 has the first alone. The noise of churn comes with
    the last row of the step before, which is where the table has noise; the first step starts at
    its raised sigma at once, N(0, sigma^2).

    Args:
        sigmas: (L,) descending.
        denoise: take the step from sigma_L to 0.
    """
    sigma, after, noise = _churned(sigmas, churn or Churn(), denoise)
    delta, zero = sigma - after, np.zeros_like(sigma)
    rows = 2 * len(sigma) - bool(after[-1] == 0)

    def two(first: Column, second: Column) -> Column:
        return np.stack((first, second), axis=1).ravel()[:rows]

    return table(
        "heun",
        two(sigma, after),
        np.repeat(np.arange(len(sigma)), 2)[:rows],
        b=two(delta, delta / 2),
        g=two(zero, -delta / 2),
        q=two(zero + 1, zero),
        c=two(zero, noise),
        initial="prior",
    )


def _churned(sigmas: ArrayLike, churn: Churn, denoise: bool) -> tuple[Column, Column, Column]:
    """Of each step: the raised sigma it starts at, where it ends, the noise for the next one."""
    sigma, after = steps_of(sigmas, denoise)
    raised = churn.raised(sigma)
    excess = churn.s_noise * np.sqrt(raised**2 - sigma**2)
    return raised, after, np.append(excess[1:], 0.0)


def dpm_solver_pp(
    sigmas: ArrayLike, *, eta: float = 0.0, s_noise: float = 1.0, denoise: bool = True
) -> Program:
    """DPM-Solver++(2M) (Lu et al. 2022) in VE form; with eta > 0 its SDE variant (midpoint).

    With h_i = ln(sigma_i / sigma_{i+1}) and w = h_i / (2 h_{i-1}):
        x' = (sigma_{i+1} / sigma_i) e^(-eta h) x + (1 - e^(-(1 + eta) h)) ((1 + w) D_i - w D_{i-1})
             + s_noise sigma_{i+1} sqrt(1 - e^(-2 eta h)) z
    The first step, and the one to 0, have w = 0. NFE = L, or L - 1 without the denoise.

    Args:
        sigmas: (L,) descending.   eta: 0 for the flow, 1 for the reverse SDE.
        denoise: take the step from sigma_L to 0, which returns D_L.
    """
    sigma, after = steps_of(sigmas, denoise)
    if not (0 <= eta < math.inf and 0 <= s_noise < math.inf):
        raise ValueError(f"eta and s_noise must be at least 0; got {eta} and {s_noise}")
    with np.errstate(divide="ignore"):
        h = -np.log(after / sigma)  # infinite for the step to 0
    moving = np.isfinite(h)
    w = np.zeros_like(h)
    w[1:] = np.where(moving[1:], h[1:] / (2 * h[:-1]), 0.0)
    weight = -np.expm1(-(1 + eta) * h)
    c = s_noise * after * np.sqrt(-np.expm1(-2 * eta * np.where(moving, h, 0.0)))
    return table(
        "dpmpp",
        sigma,
        np.arange(len(sigma)),
        a=1 + weight * w,
        b=weight * (1 + w) * sigma,
        g=-weight * w,
        p=np.ones_like(h),
        q=sigma,
        c=c,
        initial="prior",
    )


def fast(
    sigmas: ArrayLike, *, eta: float = FAST_ETA, s_noise: float = 1.0, denoise: bool = True
) -> Program:
    """DPM-Solver++(2M) with more noise than the reverse SDE has: eta = 4.

    Every eta has the same marginals where steps are small; the larger it is, the sooner a chain
    forgets where it came from. Two things are worth forgetting. Chains start at N(0, sigma_1^2),
    but the data's mean is not 0, which a flow carries into the weights of the modes. And NCSNv2
    networks are not told the noise level, so that an error of it lasts until fresh noise covers it.
    But noise moves D from step to step, which extrapolation magnifies: the larger eta, the more
    steps it takes until the weights of modes are right.
    `benchmarks/quality.py` measures both, on the shipped model and on mixtures of known weights;
    FAST_STEPS geometric levels between the ends of the ladder are there as good as annealed
    Langevin dynamics. NFE = L, or L - 1 without the denoise.

    Args:
        sigmas: (L,) descending.   eta, s_noise, denoise: as in `dpm_solver_pp`.
    """
    program = dpm_solver_pp(sigmas, eta=eta, s_noise=s_noise, denoise=denoise)
    return dataclasses.replace(program, name="fast")
