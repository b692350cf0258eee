"""VP and sub-VP models: their own samplers, and their conversion to VE models.

A score model s(x, t) of a VP- or sub-VP-SDE can be sampled in two ways. (For networks that predict
the noise, s = -net(x, 999 t) / std(t), as published.)

The programs in `samplers/reverse_sde.py` sample it directly; `rows` returns the network they call:

    from ncsn_fast.samplers.program import Chains, initial_state, run
    from ncsn_fast.samplers.reverse_sde import vp_ancestral
    from ncsn_fast.samplers.vp import as_ve, rows
    from ncsn_fast.diffusion.sde import VP

    sde, samples = VP(), torch.arange(8)
    program = vp_ancestral(sde, 200)
    chains = Chains(initial_state(program, 0, samples, (3, 8, 8)), 0, samples)
    images = run(program, rows(score, sde, 200), chains)

Alternatively, since x = m(t) x0 + std(t) z, y = x / m(t) is x0 with noise of standard deviation
sigma = std(t) / m(t). This is a VE model of the same data, with the score m(t) s(m(t) y, t):
`as_ve`. It works with everything that takes score(x, sigma): the probability flow, likelihoods,
predictor-corrector and adaptive sampling, MCMC.

    from ncsn_fast.evaluation.likelihood import log_likelihood
    from ncsn_fast.samplers.ode import probability_flow

    ve = as_ve(score, sde)
    y = ve.prior_std * torch.randn(8, 3, 8, 8)
    flow = ve.mean_scale * probability_flow(ve.score, y, ve.sigma_max, ve.sigma_min).x
    options = {"prior_std": ve.prior_std, "data_range": (-1 / ve.mean_scale, 1 / ve.mean_scale)}
    found = log_likelihood(ve.score, images / ve.mean_scale, ve.sigma_min, ve.sigma_max, **options)

These images are in [-1, 1], as is usual for VP models. The range of y is wider by 1 / m, which adds
D log m to the density of y, so that `bpd` is that of the images; `nll` is that of y.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ncsn_fast.diffusion.sde import SDE
from ncsn_fast.samplers.procedure import per_sample

TimeScore = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t (B,)) -> grad log p_t, shape of x

T_END = 1e-3  # final time of the published VP samplers


def rows(
    score: TimeScore, sde: SDE, n: int, t_end: float = T_END
) -> Callable[[Tensor, int], Tensor]:
    """Returns a VP program's network, f = std(t) s(x, t) at row k of t = linspace(1, t_end, n).

    n and t_end must be those of the program.
    """
    times = np.linspace(1.0, t_end, n)

    def network(x: Tensor, k: int) -> Tensor:
        t = torch.full((len(x),), float(times[k]), dtype=x.dtype, device=x.device)
        return float(sde.std(times[k])) * score(x, t)

    return network


@dataclasses.dataclass(frozen=True)
class AsVE:
    """VP or sub-VP model converted to VE by y = x / m(t); see the module docstring.

    Attributes:
        score: (y, sigma (B,)) -> grad log p_sigma(y), shape of y; differentiable where s is.
        sigma_min, sigma_max: noise levels at t_end and at t = 1.
        prior_std: standard deviation of y at t = 1, where x has the SDE's prior.
        mean_scale: m(t_end); y times it is the model's x.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    sigma_min: float
    sigma_max: float
    prior_std: float
    mean_scale: float


def as_ve(score: TimeScore, sde: SDE, t_end: float = T_END) -> AsVE:
    """Converts a score s(x, t) to a VE model; s is evaluated at t in [0, 1] only.

    Args:
        t_end: the smallest time, in (0, 1).
    """
    if not 0 < t_end < 1:
        raise ValueError(f"t_end must be in (0, 1); got {t_end}")

    def ve_score(y: Tensor, sigma: Tensor) -> Tensor:
        t = sde.time(sigma.double()).clamp(0, 1)
        m = per_sample(sde.mean_scale(t), y)
        return m * score(m * y, t.to(y.dtype))

    return AsVE(
        ve_score,
        sigma_min=float(sde.noise_level(t_end)),
        sigma_max=float(sde.noise_level(1.0)),
        prior_std=sde.prior_std / float(sde.mean_scale(1.0)),
        mean_scale=float(sde.mean_scale(t_end)),
    )
