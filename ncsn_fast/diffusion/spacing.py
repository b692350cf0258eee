"""Spacings of noise levels between two ends, and the check of a ladder; float64, without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ncsn_fast.names import suggestion

if TYPE_CHECKING:  # the command line lists schedules before torch is imported
    from torch import Tensor

Schedule = Literal["ladder", "geometric", "karras", "polynomial"]
KARRAS_RHO = 7.0  # Karras et al. 2022, table 1.
POLYNOMIAL_RHO = 1.5  # On Gaussian data, dpmpp errs 2.6 to 2.8 times less than with 1 (geometric).


def check_ladder(sigmas: Tensor | NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns sigmas as float64 (L,).

    Raises ValueError unless they are positive, finite and strictly descending.
    """
    ladder = np.asarray(sigmas, dtype=np.float64)
    if ladder.ndim != 1 or ladder.size == 0:
        raise ValueError(f"sigmas must be a non-empty vector; got shape {ladder.shape}")
    if not (np.isfinite(ladder).all() and (ladder > 0).all()):
        raise ValueError("sigmas must be positive and finite")
    rising = np.flatnonzero(np.diff(ladder) >= 0)
    if rising.size:
        i = int(rising[0])
        raise ValueError(
            f"sigmas must be descending; "
            f"got sigmas[{i}]={ladder[i]:g} <= sigmas[{i + 1}]={ladder[i + 1]:g}"
        )
    return ladder


def karras(
    sigma_begin: float, sigma_end: float, n: int, rho: float = KARRAS_RHO
) -> NDArray[np.float64]:
    """Returns n levels evenly spaced in sigma^(1/rho), without 0 (Karras et al. 2022, eq. 5).

    A larger rho puts more levels at small sigmas; the limit is geometric.
    """
    ramp = _ramp(sigma_begin, sigma_end, n, rho)
    low, high = sigma_end ** (1 / rho), sigma_begin ** (1 / rho)
    return _between(sigma_begin, sigma_end, (low + ramp * (high - low)) ** rho)


def polynomial(
    sigma_begin: float, sigma_end: float, n: int, rho: float = POLYNOMIAL_RHO
) -> NDArray[np.float64]:
    """Returns n levels whose log sigma is a polynomial of degree rho in the step.

    sigma_end (sigma_begin / sigma_end)^(u^rho) with u from 1 to 0; rho = 1 is geometric.
    """
    ramp = _ramp(sigma_begin, sigma_end, n, rho)
    return _between(sigma_begin, sigma_end, sigma_end * (sigma_begin / sigma_end) ** ramp**rho)


def _ramp(sigma_begin: float, sigma_end: float, n: int, rho: float) -> NDArray[np.float64]:
    """Returns (n,) evenly spaced values from 1 down to 0, after checking the arguments."""
    if n < 1:
        raise ValueError(f"steps must be at least 1; got {n}")
    if not 0 < sigma_end <= sigma_begin < math.inf:
        raise ValueError(
            f"expected 0 < sigma_end <= sigma_begin; "
            f"got sigma_begin={sigma_begin}, sigma_end={sigma_end}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive; got {rho}")
    return np.linspace(1.0, 0.0, n)


def _between(
    sigma_begin: float, sigma_end: float, levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sets both ends exactly, against rounding, and checks the levels."""
    levels[-1], levels[0] = sigma_end, sigma_begin
    return check_ladder(levels)


def spaced(
    sigmas: Tensor | NDArray[np.floating], n: int, schedule: Schedule, rho: float | None = None
) -> NDArray[np.float64]:
    """Returns n levels between the ends of a ladder; a single level is its first.

    Args:
        schedule: "ladder" picks levels of the ladder itself, evenly spread over its indices; the
            others are `geometric`, `karras` and `polynomial`.
        rho: for "karras" (None: 7) and "polynomial" (None: 1.5).
    """
    own = check_ladder(sigmas)
    if schedule not in get_args(Schedule):
        raise ValueError(
            f"schedule must be one of {', '.join(get_args(Schedule))}; got {schedule!r}"
            f"{suggestion(schedule, get_args(Schedule))}"
        )
    if schedule in ("karras", "polynomial"):
        build, usual = {
            "karras": (karras, KARRAS_RHO), "polynomial": (polynomial, POLYNOMIAL_RHO)
        }[schedule]  # fmt: skip
        return build(own[0], own[-1], n, usual if rho is None else rho)
    if rho is not None:
        raise ValueError(f"schedule {schedule!r} has no rho; karras and polynomial have")
    if schedule == "geometric":
        return polynomial(own[0], own[-1], n, 1.0)
    if not 1 <= n <= len(own):
        raise ValueError(f"schedule 'ladder' has 1 to {len(own)} steps, a ladder's levels; got {n}")
    return own[np.floor(np.linspace(0, len(own) - 1, n) + 0.5).astype(np.int64)]
