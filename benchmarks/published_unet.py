"""Published U-Nets for benchmarks, with random weights, and EDM's sampling loop as published.

The networks are this package's own modules, which run the released code's operations one by one:
eager, float32, NCHW. tests/models/test_score_unet.py compares their outputs with the released ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
from torch import Tensor

from ncsn_fast import ScoreModel
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.unet_config import preconditioned

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7  # Karras et al. 2022, table 1
LAST_SCALE = 1e-5  # of last layers as initialised (ScoreUNet.reset_parameters)


@functools.lru_cache(maxsize=1)  # races follow one another, and each network has a quarter of a GB
def model(name: str, small: bool) -> ScoreModel:
    """Returns a network of PUBLISHED_UNETS; a tiny one of its kind for tests.

    The last layers of residual branches, almost nothing as initialised, are 0.3 of the others, so
    that the output depends on every layer.
    """
    published = PUBLISHED_UNETS[name]
    network = published.network
    if small:
        sizes = (8, 3, 8, (1, 2), 1, (4,), 0.0)  # in the order of `fields`
        own = {n: v for names, v in zip(network.fields, sizes, strict=True) for n in names}
        network = dataclasses.replace(network, **own)
    config = preconditioned(
        network, published.preconditioning, sigma_max=published.sigma_max, n=published.n
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = ScoreModel(config).eval().requires_grad_(False)
    for weight in built.net.parameters():
        if weight.ndim > 1 and float(weight.abs().max()) < 1e-3:
            weight.mul_(0.3 / LAST_SCALE)
    return built


def edm_sample(model: ScoreModel, u: Tensor, steps: int, labels: Tensor | None = None) -> Tensor:
    """Runs EDM's deterministic sampler (Karras et al. 2022, algorithm 1) from u.

    As published: the state is float64, the network eager float32, every operation separate. Its
    noise, which has the weight 0, is left out.

    Args:
        u: initial state, of noise level SIGMA_MAX and data in [-1, 1].

    Returns:
        the last state, of data in [-1, 1].
    """
    k = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    ends = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    t = torch.cat([(ends[0] + k * (ends[1] - ends[0])) ** RHO, torch.zeros(1)])
    x = u.double()
    with torch.no_grad():
        for now, then in itertools.pairwise(t):
            slope = (x - denoise(model, x, now, labels)) / now
            euler = x + (then - now) * slope
            if then > 0:
                again = (euler - denoise(model, euler, then, labels)) / then
                x = x + (then - now) * (slope / 2 + again / 2)
            else:
                x = euler
    return x


def denoise(model: ScoreModel, u: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """Computes EDM's D(u; sigma) = c_skip u + c_out F(c_in u, c_noise, labels), float64."""
    known, u, sigmas = model.parameterisation, u.float(), sigma.reshape(1)
    assert known.c_noise is not None
    skip, out, inner = (float(c(sigmas)) for c in (known.c_skip, known.c_out, known.c_in))
    c = known.c_noise(sigmas).float().expand(len(u))
    f = model(inner * u, c) if labels is None else model(inner * u, c, labels)
    return (skip * u + out * f).double()
