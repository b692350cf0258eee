"""Denoiser: a model or a sampler as a module `(x, sigma) -> D`, as other packages call one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ncsn_fast.models.score import ScoreModel


class _Scores(Protocol):
    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Computes grad log p_sigma(x), shape of x."""


class Denoiser(nn.Module):
    """Posterior mean D(x, sigma) = x + sigma^2 score(x, sigma) as a module.

    It has the form of deepinv's denoisers. A ScoreModel gives gradients by x, in plain PyTorch; a
    Sampler none, and runs its engine.

    Args:
        source: a ScoreModel or a Sampler.
    """

    def __init__(self, source: ScoreModel | _Scores) -> None:
        super().__init__()
        self.source = source  # a module of this module, where it is one

    def forward(self, x: Tensor, sigma: Tensor | float, **_: Any) -> Tensor:
        """Computes D, shape and device of x; x itself where sigma is 0.

        Args:
            x: (N, C, H, W), clean images in [0, 1] plus noise.
            sigma: standard deviation of the noise: a number, or (N,) or (N, 1, 1, 1).
        """
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).flatten()
        if len(sigmas) not in (1, len(x)):
            raise ValueError(
                f"sigma must be a number or one for each of {len(x)} images; got "
                f"{tuple(torch.as_tensor(sigma).shape)}"
            )
        sigmas = sigmas.expand(len(x))
        clean = sigmas == 0
        noisy = torch.where(clean, torch.ones_like(sigmas), sigmas)
        row = (-1, *[1] * (x.ndim - 1))
        step = sigmas.square().view(row) * self.source.score(x, noisy).to(x.device)
        return torch.where(clean.view(row), x, x + step.to(x.dtype))
