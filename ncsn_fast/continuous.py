"""The training objective of networks that see a continuous time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def continuous_score_matching(
    score_at_time: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    std: Tensor,
    noise: Tensor,
) -> Tensor:
    """Denoising score matching at continuous times, one loss per sample (N,).

    l_n = || std(t) s(x + std(t) z, t) + z ||^2, summed over pixels, without a half (Song et al.
    2021, equation 7, with lambda(t) = std(t)^2, as the tutorial has it). The training loss is the
    mean over n; a zero score has l_n = number of pixels, on average.

    Args:
        score_at_time: (x, t) -> score, shape of x.
        x: clean data (N, C, H, W).   t: (N,) in (0, 1].   std: (N,) noise level at t.
        noise: standard normal z, shape of x.
    """
    std = std[:, None, None, None]
    residual = (score_at_time(x + std * noise, t) * std + noise).float()
    return residual.square().flatten(1).sum(dim=1)


def random_times(n: int, t_min: float, generator: torch.Generator) -> Tensor:
    """Times (n,) float32, uniform on [t_min, 1)."""
    return t_min + (1 - t_min) * torch.rand(n, generator=generator)
