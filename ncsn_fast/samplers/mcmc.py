"""Markov chain Monte Carlo at one noise level: ULA, MALA and HMC, for densities or scores alone.

All three take leapfrog steps of size h from a fresh momentum p ~ N(0, I):
    p += h/2 s(x);   x += h p;   p += h/2 s(x)           (s = grad log p, the score)
One such step moves x to x + (h^2/2) s + h z. Uncorrected this is ULA, with h^2 = epsilon of the
2019 paper's x + (epsilon/2) s + sqrt(epsilon) z, and h^2/2 = alpha of `langevin.py`. MALA accepts
it with probability min(1, exp(H0 - H1)), H = -log p(x) + 1/2 ||p||^2; HMC takes several steps per
accept/reject decision.

Noise follows the noise contract (ops/noise.py), so chain i is the same in any batch: step k of a
chain draws its momentum from stream 0 and its decision from stream 4, and each chain has its own
step size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.targets import Point, Target, per_sample, row_sums, rows

MALA_TARGET, HMC_TARGET = 0.574, 0.651  # optimal acceptance in many dimensions

# Only the averaging weights are those of dual averaging (Hoffman & Gelman 2014): its updates of
# log h do not fade, and left the acceptance .06 to .1 above its target after 400 steps.
_GAIN, _FORGETTING = 0.6, 0.75


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a sampler; its statistics exclude the warm-up.

    Attributes:
        x: last states (N, ...).
        states: (K, N, ...), every `thin`-th state; None if thin is 0.
        acceptance: (N,) mean acceptance probability per chain; 1 for ULA.
        accepted: (N,) fraction of accepted proposals.
        nonfinite: (N,) number of proposals with a NaN or infinite energy, which are rejected and
            indicate too large a step. For ULA, which rejects nothing, the number of non-finite
            states.
        step_size: (N,) h per chain, as adapted in the warm-up.
        nfe: score evaluations per chain, warm-up included.
        next_step: `first_step` for a call that continues these chains bit for bit.
    """

    x: Tensor
    states: Tensor | None
    acceptance: Tensor
    accepted: Tensor
    nonfinite: Tensor
    step_size: Tensor
    nfe: int
    next_step: int


def leapfrog(
    target: Target, start: Point, p: Tensor, h: Tensor, n_leapfrog: int
) -> tuple[Point, Tensor]:
    """Takes n_leapfrog steps of size h (N,) from (x, p) and returns the end point and its momentum.

    Starting from the end with momentum -p reverses them.
    """
    point, size = start, per_sample(h, p).to(p.dtype)
    for _ in range(n_leapfrog):
        p = p + 0.5 * size * point.score
        point = target.at(point.x + size * p)
        p = p + 0.5 * size * point.score
    return point, p


class _Adaptation:
    """Step sizes (N,), each adapted to a target acceptance from its own chain alone.

    log h_{m+1} = log h_m + m^-0.6 (probability - t) / sqrt(t (1 - t)) for the target t (Robbins &
    Monro 1951; Andrieu & Thoms 2008, section 4.2). The final value is a geometric mean in which the
    first steps have little weight.
    """

    def __init__(self, step_size: Tensor, target_acceptance: float) -> None:
        self.target, self.count = target_acceptance, 0
        # Divided by a decision's standard deviation: else a small step would grow too slowly where
        # the target acceptance is high.
        self.spread = math.sqrt(target_acceptance * (1 - target_acceptance))
        self.log_h, self.log_mean = step_size.log(), step_size.log()

    def update(self, probability: Tensor, *, last: bool) -> Tensor:
        """Returns the next step sizes, after a proposal accepted with this probability (N,).

        Args:
            last: whether the warm-up ends here, so that the returned sizes are final.
        """
        self.count += 1
        error = (probability - self.target) / self.spread
        self.log_h = self.log_h + self.count**-_GAIN * error
        weight = self.count**-_FORGETTING
        self.log_mean = weight * self.log_h + (1 - weight) * self.log_mean
        return (self.log_mean if last else self.log_h).exp()


def ula(
    target: Target,
    x: Tensor,
    *,
    step_size: float | Tensor,
    n_steps: int,
    n_warmup: int = 0,
    seed: int = 0,
    samples: Tensor | None = None,
    first_step: int = 0,
    thin: int = 0,
) -> Result:
    """Runs the unadjusted Langevin algorithm: x + (h^2/2) s(x) + h z, never rejected.

    Its stationary distribution is off by O(h^2): on N(0, s^2) its variance is
    s^2 / (1 - h^2 / (4 s^2)), and it diverges for h >= 2 s. NFE = n_warmup + n_steps.

    Args:
        step_size: h, a number or (N,).   n_warmup: steps that are not counted.   For the others,
            see `hmc`.
    """
    run = _Run(x, step_size, n_steps, n_warmup, seed, samples, first_step, thin)
    nonfinite = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    h = per_sample(run.h, x).to(x.dtype)
    with torch.no_grad():
        for k in range(run.n):
            s = target.at(x).score
            x = x + 0.5 * h.square() * s + h * run.momentum(k)
            if k >= n_warmup:
                nonfinite += ~torch.isfinite(rows(x)).all(1)
            run.keep(k, x)
    one = torch.ones_like(run.h)
    return run.result(x, one, one.clone(), nonfinite, nfe=run.n)


def mala(
    target: Target, x: Tensor, *, target_acceptance: float = MALA_TARGET, **options: Any
) -> Result:
    """Runs the Metropolis-adjusted Langevin algorithm.

    ULA's proposals, accepted so that p is kept exactly.

    It is `hmc` with one leapfrog step, and takes the same options; the optimal h^2 falls as
    D^(-1/3).
    """
    return hmc(target, x, n_leapfrog=1, target_acceptance=target_acceptance, **options)


def hmc(
    target: Target,
    x: Tensor,
    *,
    step_size: float | Tensor,
    n_steps: int,
    n_leapfrog: int = 10,
    n_warmup: int = 0,
    target_acceptance: float = HMC_TARGET,
    seed: int = 0,
    samples: Tensor | None = None,
    first_step: int = 0,
    thin: int = 0,
) -> Result:
    """Runs Hamiltonian Monte Carlo (Neal 2011): n_leapfrog steps per accept/reject decision.

    NFE = 1 + (n_warmup + n_steps) (n_leapfrog + target.extra_nfe).

    Args:
        x: initial states (N, ...), not modified. The chains have its dtype and device.
        step_size: h, a number or (N,): fixed, or the initial guess of the warm-up.
        n_steps: steps after the warm-up.
        n_warmup: steps that adapt each chain's h to target_acceptance; 0 keeps step_size.
        seed, samples: noise of chain n is keyed by (seed, samples[n]); None for 0 .. N - 1.
        first_step: index of the first step, to continue from a Result's next_step.
        thin: keep every thin-th state after the warm-up; 0 keeps none.

    Raises:
        ValueError: for invalid arguments, or if density or score is not finite at the start.
    """
    if n_leapfrog < 1 or not 0 < target_acceptance < 1:
        raise ValueError(
            "expected n_leapfrog >= 1 and target_acceptance in (0, 1); "
            f"got {n_leapfrog} and {target_acceptance}"
        )
    run = _Run(x, step_size, n_steps, n_warmup, seed, samples, first_step, thin)
    h, adaptation = run.h, _Adaptation(run.h, target_acceptance)
    acceptance, accepted, nonfinite = (torch.zeros_like(h) for _ in range(3))
    with torch.no_grad():
        here = _checked_start(target.at(x))
        for k in range(run.n):
            p = run.momentum(k)
            there, q = leapfrog(target, here, p, h, n_leapfrog)
            log_a = target.difference(here, there) + 0.5 * (
                row_sums(p.square()) - row_sums(q.square())
            )
            finite = torch.isfinite(log_a)
            probability = torch.where(finite, log_a.clamp(max=0).exp(), 0.0)
            yes = run.uniform(k) < probability
            here = here.replaced(yes, there)
            if k < n_warmup:
                h = adaptation.update(probability, last=k == n_warmup - 1)
            else:
                acceptance += probability
                accepted += yes
                nonfinite += ~finite
            run.keep(k, here.x)
    run.h, count = h, max(n_steps, 1)
    nfe = 1 + run.n * (n_leapfrog + target.extra_nfe)
    return run.result(here.x, acceptance / count, accepted / count, nonfinite.long(), nfe=nfe)


def _checked_start(start: Point) -> Point:
    finite = torch.isfinite(rows(start.score)).all(1)
    if start.log_p is not None:
        finite &= torch.isfinite(start.log_p)
    if not bool(finite.all()):
        raise ValueError(
            f"chain {int((~finite).nonzero()[0])} starts where score or log density is not finite"
        )
    return start


class _Run:
    """Parts shared by the samplers: option checks, the noise of step k, and kept states."""

    def __init__(
        self, x: Tensor, step_size: float | Tensor, n_steps: int, n_warmup: int, seed: int,
        samples: Tensor | None, first_step: int, thin: int,
    ) -> None:  # fmt: skip
        if not x.is_floating_point() or x.ndim < 1:
            raise ValueError(f"x must be floating point (N, ...); got {x.dtype} {tuple(x.shape)}")
        if min(n_steps, n_warmup, thin) < 0:
            raise ValueError(
                "n_steps, n_warmup and thin must be at least 0; "
                f"got {n_steps}, {n_warmup} and {thin}"
            )
        h = torch.as_tensor(step_size, dtype=torch.float64, device=x.device)
        if h.ndim > 1 or (h.ndim == 1 and len(h) != len(x)):
            raise ValueError(f"step_size must be one or ({len(x)},); got {tuple(h.shape)}")
        if not bool(((h > 0) & torch.isfinite(h)).all()):
            raise ValueError(f"step_size must be positive and finite; got {step_size}")
        self.n, self.n_warmup, self.thin = n_warmup + n_steps, n_warmup, thin
        noise.check_uint32("seed", seed)
        noise.check_uint32("first_step", first_step)
        noise.check_uint32("number of steps", first_step + self.n)
        if samples is None:
            samples = noise.sample_indices(0, len(x), x.device)
        if samples.shape != (len(x),):
            raise ValueError(f"samples must be ({len(x)},); got {tuple(samples.shape)}")
        self.h, self.like, self.kept = h.expand(len(x)).clone(), x, list[Tensor]()
        self.seed, self.samples, self.first = seed, samples.to(x.device), first_step

    def momentum(self, k: int) -> Tensor:
        shape = tuple(self.like.shape[1:])
        z = ops.normal(self.seed, self.samples, Stream.SAMPLER, self.first + k, shape)
        return z.to(self.like.dtype)

    def uniform(self, k: int) -> Tensor:
        u = ops.uniform(self.seed, self.samples, Stream.CORRECTOR, self.first + k, (1,))
        return u.flatten().double()

    def keep(self, k: int, x: Tensor) -> None:
        if self.thin and k >= self.n_warmup and (k - self.n_warmup + 1) % self.thin == 0:
            self.kept.append(x)

    def result(
        self, x: Tensor, acceptance: Tensor, accepted: Tensor, nonfinite: Tensor, *, nfe: int
    ) -> Result:
        states = None
        if self.thin:
            states = torch.stack(self.kept) if self.kept else x.new_zeros(0, *x.shape)
        end = self.first + self.n
        return Result(x, states, acceptance, accepted, nonfinite, self.h, nfe, end)
