"""Few-step samplers as programs: Euler's and Heun's methods, DPM-Solver++(2M), and `fast`.

All solve the probability flow dx / dsigma = -sigma s(x, sigma) down the noise levels and, with
`denoise`, from the last level to 0, where x is the denoiser output D = x + sigma f (f = sigma *
score, program.py). The history h holds a value from the previous row: Heun's first slope, or D.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.samplers.choices import FAST_ETA, FAST_FINAL, FAST_HISTORY
from ncsn_fast.samplers.program import Column, Program, table
from ncsn_fast.samplers.reverse_sde import steps_of


@dataclasses.dataclass(frozen=True)
class Churn:
    """Added noise that raises a step's sigma to (1 + gamma) sigma first (EDM's algorithm 2).

    Attributes:
        amount: S_churn; gamma = min(S_churn / N, sqrt(2) - 1) for N steps; 0 for none.
        s_min, s_max: range of sigmas that get noise.   s_noise: scale of the noise.
        known: the levels that a network knows nearest to given ones; None for all of them.
    """

    amount: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    known: Callable[[Column], Column] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.s_noise < math.inf):
            raise ValueError(
                f"churn and s_noise must be at least 0; got {self.amount} and {self.s_noise}"
            )
        if not 0 <= self.s_min <= self.s_max:
            raise ValueError(f"expected 0 <= s_min <= s_max; got {self.s_min} and {self.s_max}")

    def raised(self, sigma: Column) -> Column:
        """Returns (1 + gamma) sigma, (N,), or the level nearest to it that the network knows."""
        gamma = min(self.amount / len(sigma), math.sqrt(2) - 1)
        within = (self.s_min <= sigma) & (sigma <= self.s_max)
        raised = np.where(within, sigma * (1 + gamma), sigma)
        return raised if self.known is None else np.maximum(sigma, self.known(raised))


def euler(sigmas: ArrayLike, *, churn: Churn | None = None, denoise: bool = True) -> Program:
    """Returns Euler's method on the probability flow, x + (sigma_i - sigma_{i+1}) f: the DDIM step.

    NFE = L, or L - 1 without `denoise`. See `heun` for how churn works.

    Args:
        sigmas: (L,) descending.
    """
    sigma, after, noise = _churned(sigmas, churn or Churn(), denoise)
    level = np.arange(len(sigma))
    return table("euler", sigma, level, b=sigma - after, c=noise, initial="prior")


def heun(sigmas: ArrayLike, *, churn: Churn | None = None, denoise: bool = True) -> Program:
    """Returns Heun's method (EDM: Karras et al. 2022, algorithms 1 and 2).

    NFE = 2 L - 1, or 2 L - 2 without `denoise`.

    A step is two rows: x' = x + Delta f and, at sigma_{i+1}, x' + Delta (f' - f) / 2, with
    Delta = sigma_i - sigma_{i+1}; the step to 0 has only the first. The noise of churn is added by
    the last row of the previous step, since a row adds noise at its end; the first step starts
    directly at its raised sigma, from N(0, sigma^2).

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
    """Returns each step's raised start sigma, end sigma, and noise for the next step."""
    sigma, after = steps_of(sigmas, denoise)
    raised = churn.raised(sigma)
    excess = churn.s_noise * np.sqrt(raised**2 - sigma**2)
    return raised, after, np.append(excess[1:], 0.0)


def dpm_solver_pp(
    sigmas: ArrayLike,
    *,
    eta: ArrayLike = 0.0,
    history: ArrayLike = 1.0,
    s_noise: ArrayLike = 1.0,
    final: float = 0.0,
    denoise: bool = True,
) -> Program:
    """Returns DPM-Solver++(2M) (Lu et al. 2022) in VE form; for eta > 0 its SDE variant (midpoint).

    With h_i = ln(sigma_i / sigma_{i+1}) and w = history_i h_i / (2 h_{i-1}):
        x' = (sigma_{i+1} / sigma_i) e^(-eta h) x + (1 - e^(-(1 + eta) h)) ((1 + w) D_i - w D_{i-1})
             + s_noise sigma_{i+1} sqrt(1 - e^(-2 eta h)) z
    The first step has w = 0, and the step to 0 has w = `final`. NFE = L, or L - 1 without
    `denoise`.

    eta, history and s_noise may differ by row. history = 0 is a method of first order, and with
    eta = 0 Euler's. The solvers of the extended reverse SDE (Cui et al. 2023) are such tables, too:
    there e^(-(1 + eta) h) = phi(sigma_{i+1}) / phi(sigma_i), and history weights the divided
    difference of D as their second order does.

    Args:
        sigmas: (L,) descending.   eta: 0 for the flow, 1 for the reverse SDE; a number or (L,).
        history: weight of the extrapolation from D_{i-1}, 1 for 2M; a number or (L,).
        s_noise: scale of the noise, a number or (L,).
        final: weight of the extrapolation in the step to 0, which gives back detail that D_L
            lacks where sigma_L is large.
        denoise: take the step from sigma_L to 0, which returns (1 + final) D_L - final D_{L-1}.
    """
    sigma, after = steps_of(sigmas, denoise)
    eta, history, s_noise = (_of_rows(value, len(sigma)) for value in (eta, history, s_noise))
    for value in (eta, s_noise):
        if not bool(((value >= 0) & (value < math.inf)).all()):
            raise ValueError(
                f"eta and s_noise must be at least 0; got {_short(eta)} and {_short(s_noise)}"
            )
    for name, value in (("history", history), ("final", np.asarray(final, dtype=np.float64))):
        if not bool(np.isfinite(value).all()):
            raise ValueError(f"{name} must be finite; got {_short(value.reshape(-1))}")
    with np.errstate(divide="ignore"):
        h = -np.log(after / sigma)  # infinite for the step to 0
    finite = np.where(np.isfinite(h), h, 0.0)
    w = np.zeros_like(h)
    w[1:] = np.where(np.isfinite(h[1:]), history[1:] * (finite[1:] / (2 * h[:-1])), final)
    weight = -np.expm1(-(1 + eta) * h)
    c = s_noise * after * np.sqrt(-np.expm1(-2 * eta * finite))
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


def _of_rows(value: ArrayLike, rows: int) -> Column:
    """Returns a number, or the first of (L,) numbers, as a column of that many rows."""
    column = np.asarray(value, dtype=np.float64)
    if column.ndim > 1 or (column.ndim == 1 and len(column) < rows):
        raise ValueError(f"expected a number or one for each level; got shape {column.shape}")
    return np.broadcast_to(column, rows) if column.ndim == 0 else column[:rows]


def _short(column: Column) -> str:
    """Returns a column for a message, as one number if its rows are equal."""
    same = np.array_equal(column, np.full_like(column, column[0]), equal_nan=True)
    return str(column[0]) if same else str(column.tolist())


def rows_of_knots(
    eta: Sequence[float], history: Sequence[float], levels: int
) -> tuple[Column, Column]:
    """Returns eta and the weight of the history of each step between two of so many levels.

    Args:
        eta, history: their values at evenly spread knots, from the first step to the last; the root
            of eta and history are linear between them.
    """
    along = np.linspace(0.0, 1.0, max(levels - 1, 0))
    root = np.interp(along, np.linspace(0, 1, len(eta)), np.sqrt(eta))
    return root**2, np.interp(along, np.linspace(0, 1, len(history)), history)


def fast(
    sigmas: ArrayLike, *, eta: float | None = None, s_noise: float = 1.0, denoise: bool = True
) -> Program:
    """Returns DPM-Solver++(2M) with more noise than the reverse SDE, the more the later the row.

    For small steps every eta has the same marginals; the larger eta is, the sooner a chain forgets
    its past. That helps in two ways. Chains start at N(0, sigma_1^2), but the data's mean is not 0,
    and a flow turns that error into wrong mode weights. And NCSNv2 networks are not conditioned on
    the noise level, so an error in it persists until fresh noise covers it. On the other hand noise
    moves D from step to step, and extrapolation amplifies that: at the first rows, where the modes
    part, less noise gives better weights; at the later ones, where detail forms, more noise gives
    samples that are more often recognised. The table was chosen from what benchmarks/fit_fast.py
    measures; `benchmarks/quality.py` judges it, on other data: FAST_STEPS geometric levels between
    the ends of the ladder are as good as annealed Langevin dynamics. NFE = L, or L - 1 without
    `denoise`.

    Args:
        sigmas: (L,) descending.
        eta: of all rows, with the history of 2M, as in `dpm_solver_pp`; None for the chosen table.
        s_noise, denoise: as in `dpm_solver_pp`.
    """
    if eta is not None:
        program = dpm_solver_pp(sigmas, eta=eta, s_noise=s_noise, denoise=denoise)
        return dataclasses.replace(program, name="fast")
    etas, history = rows_of_knots(FAST_ETA, FAST_HISTORY, len(np.atleast_1d(sigmas)))
    return _of_steps(sigmas, etas, history, s_noise=s_noise, final=FAST_FINAL, denoise=denoise)


def tuned(fitted: TunedTable, *, denoise: bool = True) -> Program:
    """Returns `fast` by a table that was fitted to a model (`python -m ncsn_fast.tune`).

    Chains start at N(mean, sigma_1^2) if it has a mean. NFE = its rows, one less without `denoise`.
    """
    program = _of_steps(
        fitted.sigmas, fitted.eta, fitted.history,
        s_noise=fitted.s_noise, final=fitted.final, denoise=denoise,
    )  # fmt: skip
    return dataclasses.replace(program, mean=fitted.mean_image())


def _of_steps(
    sigmas: ArrayLike, eta: Iterable[float], history: Iterable[float], **more: Any
) -> Program:
    """Returns `fast` by eta and history of the steps between two levels; 0 in the step to 0."""
    program = dpm_solver_pp(sigmas, eta=[*eta, 0.0], history=[*history, 0.0], **more)
    return dataclasses.replace(program, name="fast")
