"""Log-likelihood by the instantaneous change of variables (Song et al. 2021, section 4.3).

Along the probability flow of a VE-SDE, from x at sigma_min to its latent at sigma_max,
    dx / dlog sigma = -sigma^2 score(x, sigma),     dV / dlog sigma = -sigma^2 div score(x, sigma),
    log p(x) = log N(latent; prior_mean, prior_std^2 I) + V     in nats, with V = 0 at sigma_min.
The divergence is exact (as many gradients as a sample has elements) or Hutchinson's estimate: the
mean of v^T J v over probes v with unit covariance, which stay the same for the whole path.
It is the density of the data smoothed by sigma_min; for data in 2^bits grey levels it bounds their
probability once they are dequantised: -log2 p(x) / D + log2(2^bits / width of data_range) bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.procedure import Score, per_sample
from ncsn_fast.samplers.runge_kutta import solve

Trace = Literal["rademacher", "gaussian", "exact"]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Likelihood of each sample of a batch.

    Attributes:
        nll: (B,) float64, -log p(x) in nats.   bpd: (B,) float64, bits per dimension.
        nfe: (B,) int64, network evaluations; each comes with a gradient per probe.
        latent: the sample at sigma_max, shape of x.
        log_prior, log_volume: (B,) float64, the two parts of log p(x).
    """

    nll: Tensor
    bpd: Tensor
    nfe: Tensor
    latent: Tensor
    log_prior: Tensor
    log_volume: Tensor


def dequantise(
    levels: Tensor,
    *,
    bits: int = 8,
    data_range: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    samples: Tensor | None = None,
) -> Tensor:
    """Returns low + (high - low) (k + u) / 2^bits, u uniform on [0, 1): float32, shape of levels.

    Args:
        levels: integers k in [0, 2^bits), (B, ...).
        samples: (B,) sample indices that key u; None for 0 .. B-1.
    """
    low, high = _check_range(bits, data_range)
    if levels.dtype.is_floating_point or levels.dtype.is_complex:
        raise ValueError(f"levels must be integers in [0, {2**bits}); got {levels.dtype}")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < 2**bits:
        raise ValueError(
            f"levels must be in [0, {2**bits}); got {int(levels.min())} .. {int(levels.max())}"
        )
    samples = _samples(samples, levels)
    u = ops.uniform(seed, samples, Stream.DEQUANTISATION, 0, tuple(levels.shape[1:]))
    return low + (high - low) / 2**bits * (levels.to(torch.float32) + u)


def log_likelihood(
    score: Score,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    trace: Trace = "rademacher",
    n_probes: int = 1,
    seed: int = 0,
    samples: Tensor | None = None,
    prior_mean: Tensor | float = 0.0,
    prior_std: float | None = None,
    bits: int = 8,
    data_range: tuple[float, float] = (0.0, 1.0),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
) -> Likelihood:
    """Computes the likelihood of x (B, ...), in the units of the score; see the module docstring.

    Args:
        score: (x, sigma (B,)) -> score, differentiable in x (ScoreModel.score is; engines are not).
        x: float32 or float64; grey levels must be dequantised first (`dequantise`).
        sigma_min, sigma_max: ends of the path.
        trace: divergence: "exact", or estimated with `n_probes` "rademacher" (+1 or -1 each) or
            "gaussian" probes.
        seed, samples: keys of the probes; samples (B,) are the indices, None for 0 .. B-1.
        prior_mean, prior_std: Gaussian prior at sigma_max; prior_std None for sigma_max.
        bits, data_range: bits of the original grey levels, and the range of x that they span.
    """
    low, high = _check_range(bits, data_range)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max < inf; got {sigma_min} and {sigma_max}"
        )
    std = sigma_max if prior_std is None else prior_std
    if not 0 < std < math.inf:
        raise ValueError(f"prior_std must be positive and finite; got {std}")
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone()
        v = probes(trace, n_probes, x, seed, _samples(samples, x))
        weight = 1.0 if trace == "exact" else 1 / n_probes

        def slope(log_sigma: Tensor, state: Tensor) -> Tensor:
            sigma = log_sigma.exp().to(x.dtype)
            s, divergence = score_and_divergence(score, state[:, :-1].reshape(x.shape), sigma, v)
            change = torch.cat((s.flatten(1), weight * divergence[:, None].to(x.dtype)), dim=1)
            return -per_sample(sigma**2, change) * change

        state = torch.cat((x.flatten(1), x.new_zeros(len(x), 1)), dim=1)
        ends = math.log(sigma_min), math.log(sigma_max)
        state, nfe = solve(slope, state, *ends, rtol=rtol, atol=atol, max_steps=max_steps)
        latent, log_volume = state[:, :-1].reshape(x.shape), state[:, -1].double()
        log_prior = _log_normal(latent, prior_mean, std)
        nll = -(log_prior + log_volume)
        dimensions = math.prod(x.shape[1:])
        bpd = nll / (dimensions * math.log(2)) + math.log2(2**bits / (high - low))
    return Likelihood(nll, bpd, nfe, latent, log_prior, log_volume)


def probes(trace: Trace, n_probes: int, x: Tensor, seed: int, samples: Tensor) -> list[Tensor]:
    """Returns vectors v, each broadcasting to x: the sum (exact) or mean of v^T J v gives tr J."""
    if trace == "exact":
        dimensions = math.prod(x.shape[1:])
        basis = torch.eye(dimensions, dtype=x.dtype, device=x.device)
        return list(basis.reshape(dimensions, 1, *x.shape[1:]))
    if trace not in ("rademacher", "gaussian"):
        raise ValueError(f"trace must be 'rademacher', 'gaussian' or 'exact'; got {trace!r}")
    noise.check_integer("n_probes", n_probes, least=1)
    draw = ops.normal if trace == "gaussian" else ops.uniform
    drawn = (draw(seed, samples, Stream.PROBE, i, tuple(x.shape[1:])) for i in range(n_probes))
    if trace == "gaussian":
        return [z.to(x.dtype) for z in drawn]
    return [torch.where(u < 0.5, -1.0, 1.0).to(x.dtype) for u in drawn]


def score_and_divergence(
    score: Score, x: Tensor, sigma: Tensor, probes: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns score(x, sigma), and the sum over probes of v^T (d score / d x) v, (B,) float64."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        s = score(x, sigma)
        if not s.requires_grad:
            raise ValueError(
                "the likelihood needs a score that is differentiable in x; engines are not: use "
                "ScoreModel.score"
            )
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for v in probes:
            (gradient,) = torch.autograd.grad(s, x, v.expand_as(s), retain_graph=True)
            total += (v * gradient).flatten(1).double().sum(dim=1)
    return s.detach(), total


def _log_normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    """Returns log N(x; mean, std^2 I), (B,) float64."""
    squares = ((x.double() - mean) / std).square().flatten(1)
    return -0.5 * squares.sum(1) - squares.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def _samples(samples: Tensor | None, x: Tensor) -> Tensor:
    if samples is None:
        return noise.sample_indices(0, len(x), x.device)
    if samples.shape != (len(x),):
        raise ValueError(f"samples must be indices ({len(x)},); got shape {tuple(samples.shape)}")
    return samples


def _check_range(bits: int, data_range: tuple[float, float]) -> tuple[float, float]:
    low, high = data_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"data_range must be (low, high) with low < high; got {data_range}")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be in 1 .. 16; got {bits}")
    return low, high
