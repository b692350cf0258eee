"""ULA, MALA and HMC (`mcmc.py`) as correctors for `predictor_corrector.py`.

At noise level sigma they take leapfrog steps of size h = relative_step sigma. Their stationary
distribution p_sigma is data plus N(0, sigma^2 I), which is nowhere narrower than sigma, so a step
size that suits N(0, sigma^2 I) is stable for all data:
    ULA    0.32            x + h^2/2 s + h z: the annealed corrector at snr = h / (2 sigma) = 0.16
    MALA   1.65 D^(-1/6)   accepts .574 on N(0, sigma^2 I), and more on wider data
    HMC    1.90 D^(-1/4)   accepts .651 there, at its least favourable length
for D elements per sample (Roberts & Rosenthal 1998; Beskos et al. 2013). ULA, like the published
correctors, has too large a stationary variance; MALA and HMC keep p_sigma exactly, provided that
the score is a gradient and its line integral is exact (`targets.Target`).

    corrector = MALA(seed, samples)
    predictor_corrector(score, x, sigmas, contract_noise(seed, samples, shape), corrector=corrector)

With predictor="none" and several corrector_steps this is annealed MCMC. A move uses the first
n_steps of its noise steps, of streams 0 (momenta) and 4 (decisions), which the predictor does not
use: one seed serves both.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

from torch import Tensor

from ncsn_fast.ops import noise
from ncsn_fast.samplers.mcmc import Result, hmc, ula
from ncsn_fast.samplers.predictor_corrector import Moved
from ncsn_fast.samplers.targets import Target

ULA_STEP, MALA_STEP, HMC_STEP = 0.32, 1.65, 1.90

OneLevelScore = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class _Chain(abc.ABC):
    """Corrector (a `Move`) made of steps of a Markov chain.

    Args:
        seed, samples: key of the noise; samples (B,) are the sample indices of the states, so that
            a sample moves alike in any batch.
        relative_step: h / sigma, positive; None for the default in the module docstring.
        n_steps: chain steps per move, each with a fresh momentum.
        on_move: called after each move with sigma and the chain's Result (acceptance, non-finite
            states).
    """

    seed: int
    samples: Tensor
    relative_step: float | None = None
    n_steps: int = 1
    on_move: Callable[[float, Result], object] | None = dataclasses.field(
        default=None, kw_only=True
    )

    def __post_init__(self) -> None:
        noise.check_uint32("seed", self.seed)
        if self.relative_step is not None and not 0 < self.relative_step < math.inf:
            raise ValueError(f"relative_step must be positive and finite; got {self.relative_step}")
        if self.n_steps < 1:
            raise ValueError(f"n_steps must be at least 1; got {self.n_steps}")

    @property
    @abc.abstractmethod
    def nfe(self) -> int:
        """Evaluations of the score per move."""

    @abc.abstractmethod
    def default_step(self, dimensions: int) -> float:
        """Returns the default h / sigma for samples with this many elements."""

    @abc.abstractmethod
    def _steps(self, score: OneLevelScore, x: Tensor, h: float, first_step: int) -> Result: ...

    def __call__(self, score: OneLevelScore, x: Tensor, sigma: float, step: int) -> Moved:
        c = self.relative_step
        if c is None:
            c = self.default_step(math.prod(x.shape[1:]))
        result = self._steps(score, x, c * sigma, step)
        if self.on_move is not None:
            self.on_move(sigma, result)
        return Moved(result.x, result.x)


@dataclasses.dataclass(frozen=True)
class ULA(_Chain):
    """Unadjusted Langevin, n_steps evaluations per move.

    Its stationary variance on N(0, s^2) is s^2 / (1 - h^2 / (4 s^2)).
    """

    @property
    def nfe(self) -> int:
        return self.n_steps

    def default_step(self, dimensions: int) -> float:
        return ULA_STEP

    def _steps(self, score: OneLevelScore, x: Tensor, h: float, first_step: int) -> Result:
        return ula(
            Target(score=score), x, step_size=h, n_steps=self.n_steps, seed=self.seed,
            samples=self.samples, first_step=first_step,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HMC(_Chain):
    """Hamiltonian Monte Carlo. NFE = 1 + n_steps (n_leapfrog + n_points - 2).

    Args:
        n_leapfrog: leapfrog steps per accept/reject decision.
        n_points: quadrature points of the line integral that replaces log p(y) - log p(x); 2
            suffice for Gaussian data, and take no evaluations beyond those of the steps.
    """

    n_leapfrog: int = 5
    n_points: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_leapfrog < 1 or self.n_points < 2:
            raise ValueError(
                "expected n_leapfrog >= 1 and n_points >= 2 (the ends of the line); "
                f"got {self.n_leapfrog} and {self.n_points}"
            )

    @property
    def nfe(self) -> int:
        return 1 + self.n_steps * (self.n_leapfrog + self.n_points - 2)

    def default_step(self, dimensions: int) -> float:
        return HMC_STEP * float(max(dimensions, 1)) ** -0.25

    def _steps(self, score: OneLevelScore, x: Tensor, h: float, first_step: int) -> Result:
        return hmc(
            Target(score=score, n_points=self.n_points), x, step_size=h, n_steps=self.n_steps,
            n_leapfrog=self.n_leapfrog, seed=self.seed, samples=self.samples,
            first_step=first_step,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MALA(HMC):
    """Metropolis-adjusted Langevin: HMC of one leapfrog step. NFE = 1 + n_steps (n_points - 1)."""

    n_leapfrog: int = dataclasses.field(default=1, init=False)

    def default_step(self, dimensions: int) -> float:
        return MALA_STEP * float(max(dimensions, 1)) ** (-1 / 6)


CORRECTORS: dict[str, type[ULA] | type[MALA] | type[HMC]] = {"ula": ULA, "mala": MALA, "hmc": HMC}
