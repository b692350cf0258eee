"""Training objectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def denoising_score_matching(
    score_at: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    level: Tensor,
    noise: Tensor,
    *,
    anneal_power: float = 2.0,
) -> Tensor:
    """Denoising score matching over a ladder of noise levels, one loss per sample (N,).

    l_n = 1/2 sigma^p || s(x + sigma z, level) + z / sigma ||^2, summed over pixels (Vincent 2011;
    Song & Ermon 2019, equation 5, with lambda(sigma) = sigma^p). The training loss is the mean over
    n.

    Args:
        score_at: (x, level) -> score, shape of x.
        x: clean data (N, C, H, W).   sigmas: (L,).   level: (N,) int64.
        noise: standard normal z, shape of x.
        anneal_power: p; 2 makes all levels weigh alike.
    """
    sigma = sigmas[level][:, None, None, None]
    score = score_at(x + sigma * noise, level)
    residual = (score + noise / sigma).float()
    return 0.5 * residual.square().flatten(1).sum(dim=1) * sigma.flatten() ** anneal_power


def random_levels(n: int, n_sigmas: int, generator: torch.Generator) -> Tensor:
    """Levels (n,) int64, uniform on 0 .. n_sigmas - 1."""
    return torch.randint(n_sigmas, (n,), generator=generator)
