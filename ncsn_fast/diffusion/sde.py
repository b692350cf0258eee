"""Forward SDEs dx = f(x, t) dt + g(t) dw on t in [0, 1], with their marginals and reverse drifts.

Song et al. 2021, "Score-based generative modeling through stochastic differential equations". All
three drifts are linear, f(x, t) = rate(t) x, so that x(t) given x(0) is N(m(t) x(0), v(t) I):

    VE      f = 0              g^2 = d sigma^2 / dt          m = 1      v: see VE.start
    VP      f = -beta x / 2    g^2 = beta(t)                 m = e^c    v = 1 - e^2c
    sub-VP  f = -beta x / 2    g^2 = beta(t) (1 - e^4c)      m = e^c    v = (1 - e^2c)^2

    sigma(t) = sigma_min (sigma_max / sigma_min)^t,    beta(t) = beta_min + t (beta_max - beta_min)
    c(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2

The reverse SDE is dx = (f - g^2 s) dt + g dw with the score s; the probability flow ODE, which has
the same marginals, is dx = (f - g^2 s / 2) dt.

t is a number, an array or a tensor, and results have the same type. Differences of exponentials use
expm1, so they are accurate at small t. A t of shape (N,) belongs to x of shape (N, ...).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ncsn_fast.diffusion.spacing import check_ladder

Array = Any  # a float, a numpy array or a tensor, as t is
Column = NDArray[np.float64]


def _functions(t: Array) -> Any:
    """Returns the module whose exp, expm1 and sqrt accept t."""
    return torch if isinstance(t, Tensor) else np


def _along(coefficient: Array, x: Array) -> Array:
    """Reshapes a coefficient (N,) to multiply x (N, ...); returns scalars unchanged."""
    if np.ndim(coefficient) == 1 and x.ndim > 1:
        return coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return coefficient


@dataclasses.dataclass(frozen=True)
class Discretisation:
    """Discretised SDE: x_{i+1} = (1 + rate_i) x_i + g_i z for i = 0 .. N - 1.

    Attributes:
        t: (N,) times, ascending.   rate, g: (N,) per step, not per unit of time.
    """

    t: Column
    rate: Column
    g: Column


class SDE(abc.ABC):
    """Forward SDE with a linear drift."""

    @abc.abstractmethod
    def rate(self, t: Array) -> Array:
        """Computes f(x, t) / x, per unit of time."""

    @abc.abstractmethod
    def diffusion(self, t: Array) -> Array:
        """Computes g(t), per square root of time."""

    @abc.abstractmethod
    def mean_scale(self, t: Array) -> Array:
        """Computes m(t), where E[x(t) | x(0)] = m(t) x(0)."""

    @abc.abstractmethod
    def std(self, t: Array) -> Array:
        """Computes the standard deviation sqrt(v(t)) of x(t) given x(0)."""

    @abc.abstractmethod
    def time(self, noise_level: Array) -> Array:
        """Computes the time t that has this noise level."""

    @property
    @abc.abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I), which approximates x(1)."""

    @abc.abstractmethod
    def discretise(self, n: int, t_end: float = 0.0) -> Discretisation:
        """Returns the published discretisation in n steps, at n times from t_end to 1."""

    def noise_level(self, t: Array) -> Array:
        """Computes sqrt(v(t)) / m(t), the noise's standard deviation in x(t) / m(t)."""
        return self.std(t) / self.mean_scale(t)

    def drift(self, x: Array, t: Array) -> Array:
        """Computes f(x, t), shape of x."""
        return _along(self.rate(t), x) * x

    def marginal(self, x0: Array, t: Array) -> tuple[Array, Array]:
        """Computes the mean (shape of x0) and standard deviation of x(t) given x(0) = x0."""
        return _along(self.mean_scale(t), x0) * x0, _along(self.std(t), x0)

    def reverse_drift(self, x: Array, score: Array, t: Array) -> Array:
        """Computes f(x, t) - g(t)^2 score, shape of x, for time running from 1 to 0."""
        return self.drift(x, t) - _along(self.diffusion(t) ** 2, x) * score

    def flow_drift(self, x: Array, score: Array, t: Array) -> Array:
        """Computes f(x, t) - g(t)^2 score / 2, the drift of the probability flow; shape of x."""
        return self.drift(x, t) - _along(self.diffusion(t) ** 2, x) * score / 2

    def prior_log_density(self, x: Tensor) -> Tensor:
        """Computes log N(x; 0, prior_std^2 I) in nats, (N,) for x (N, ...)."""
        flat = x.flatten(1)
        constant = flat.shape[1] * math.log(math.sqrt(2 * math.pi) * self.prior_std)
        return -flat.square().sum(dim=1) / (2 * self.prior_std**2) - constant


@dataclasses.dataclass(frozen=True)
class VE(SDE):
    """Variance exploding SDE, sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    Args:
        start: distribution of x(0). "noised" (score SDE): data that already has noise sigma_min, so
            that v(t) = sigma(t)^2 is measured from the clean data and the score at t is the one at
            noise level sigma(t). "clean" (the MNIST tutorial): clean data, v(t) = sigma(t)^2 -
            sigma_min^2.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    start: Literal["noised", "clean"] = "noised"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}"
            )
        if self.start not in ("noised", "clean"):
            raise ValueError(f"start must be 'noised' or 'clean'; got {self.start!r}")

    @classmethod
    def from_sigmas(cls, sigmas: ArrayLike | Tensor) -> VE:
        """Returns the SDE whose discretisation is an NCSN or NCSNv2 ladder (L,), L >= 2.

        sigma(t) is geometric between the ladder's ends, as the published ladders are.
        """
        ladder = check_ladder(np.asarray(sigmas, dtype=np.float64))
        if len(ladder) < 2:
            raise ValueError("an SDE needs a ladder of at least two sigmas; got one")
        return cls(float(ladder[-1]), float(ladder[0]))

    @classmethod
    def power(cls, base: float) -> VE:
        """Returns dx = base^t dw from clean data: v(t) = (base^2t - 1) / (2 ln base)."""
        if not 1 < base < math.inf:
            raise ValueError(f"base must be greater than 1; got {base}")
        scale = 1 / math.sqrt(2 * math.log(base))
        return cls(scale, base * scale, "clean")

    @property
    def log_ratio(self) -> float:
        """Logarithm ln(sigma_max / sigma_min)."""
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Array) -> Array:
        """Computes sigma(t)."""
        return self.sigma_min * _functions(t).exp(t * self.log_ratio)

    def rate(self, t: Array) -> Array:
        return 0.0 * t

    def diffusion(self, t: Array) -> Array:
        return self.sigma(t) * math.sqrt(2 * self.log_ratio)

    def mean_scale(self, t: Array) -> Array:
        return 0.0 * t + 1.0

    def std(self, t: Array) -> Array:
        if self.start == "noised":
            return self.sigma(t)
        functions = _functions(t)
        return self.sigma_min * functions.sqrt(functions.expm1(2 * t * self.log_ratio))

    def time(self, noise_level: Array) -> Array:
        ratio, functions = noise_level / self.sigma_min, _functions(noise_level)
        if self.start == "noised":
            return functions.log(ratio) / self.log_ratio
        return functions.log1p(ratio**2) / (2 * self.log_ratio)

    @property
    def prior_std(self) -> float:
        return float(self.std(1.0))

    def discretise(self, n: int, t_end: float = 0.0) -> Discretisation:
        """Returns the chain with g_i^2 = std_i^2 - std_{i-1}^2.

        std_{-1} = 0: the first step adds noise to clean data.
        """
        t = _times(n, t_end)
        g = np.sqrt(np.diff(self.std(t) ** 2, prepend=0.0))
        return Discretisation(t, np.zeros(n), g)


@dataclasses.dataclass(frozen=True)
class VP(SDE):
    """Variance preserving SDE; the limit of DDPM for many steps."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"expected 0 < beta_min <= beta_max; got {self.beta_min} and {self.beta_max}"
            )

    def beta(self, t: Array) -> Array:
        """Computes beta(t), per unit of time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean_scale(self, t: Array) -> Array:
        """Computes c(t) = log m(t)."""
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def rate(self, t: Array) -> Array:
        return -self.beta(t) / 2

    def diffusion(self, t: Array) -> Array:
        return _functions(t).sqrt(self.beta(t))

    def mean_scale(self, t: Array) -> Array:
        return _functions(t).exp(self.log_mean_scale(t))

    def std(self, t: Array) -> Array:
        functions = _functions(t)
        return functions.sqrt(-functions.expm1(2 * self.log_mean_scale(t)))

    def time(self, noise_level: Array) -> Array:
        return self._time_of(_functions(noise_level).log1p(noise_level**2))  # e^-2c - 1 = level^2

    def _time_of(self, loss: Array) -> Array:
        """Solves -2 c(t) = loss for t, a quadratic, without cancellation."""
        growth = self.beta_max - self.beta_min
        root = _functions(loss).sqrt(self.beta_min**2 + 2 * growth * loss)
        return 2 * loss / (self.beta_min + root)

    @property
    def prior_std(self) -> float:
        return 1.0

    def discretise(self, n: int, t_end: float = 0.0) -> Discretisation:
        """Returns DDPM's chain x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z.

        beta_i is linear from beta_min / n to beta_max / n, whatever t_end is.
        """
        t = _times(n, t_end)
        if n <= self.beta_max:
            raise ValueError(f"expected more than beta_max = {self.beta_max:g} steps; got {n}")
        beta = np.linspace(self.beta_min / n, self.beta_max / n, n)
        return Discretisation(t, np.expm1(np.log1p(-beta) / 2), np.sqrt(beta))


@dataclasses.dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP SDE: the mean of VP with a smaller variance."""

    def diffusion(self, t: Array) -> Array:
        functions = _functions(t)
        return functions.sqrt(self.beta(t) * -functions.expm1(4 * self.log_mean_scale(t)))

    def std(self, t: Array) -> Array:
        return -_functions(t).expm1(2 * self.log_mean_scale(t))

    def time(self, noise_level: Array) -> Array:
        return self._time_of(2 * _functions(noise_level).arcsinh(noise_level / 2))  # -2 sinh c

    def discretise(self, n: int, t_end: float = 0.0) -> Discretisation:
        """Returns the Euler discretisation: rate / n and g / sqrt(n)."""
        t = _times(n, t_end)
        return Discretisation(t, self.rate(t) / n, self.diffusion(t) / math.sqrt(n))


def _times(n: int, t_end: float) -> Column:
    """Returns (n,) times from t_end to 1; for n = 1 the time is 1."""
    if n < 1:
        raise ValueError(f"steps must be at least 1; got {n}")
    if not 0 <= t_end < 1:
        raise ValueError(f"t_end must be in [0, 1); got {t_end}")
    return np.linspace(1.0, t_end, n)[::-1]
