"""Score matching objectives: explicit, implicit, denoising and sliced, one loss per sample (N,).

A score is any callable or module, x (N, ...) -> (N, ...), that treats each sample independently:
row n of the result depends only on row n of x (no batch statistics). An energy E has the score
`score_of(E)`. D is the number of scalars per sample. Up to a constant that does not depend on the
score,
    explicit = implicit = sliced (on average over slices),
and denoising is the explicit loss on the data plus N(0, sigma^2). The training loss is the mean
over n. Where gradients are enabled, every loss is differentiable with respect to the score's
parameters and to x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
Slices = Literal["gaussian", "rademacher", "sphere"]


def score_of(energy: Callable[[Tensor], Tensor]) -> Score:
    """Returns the score -grad E of an energy E, x (N, ...) -> (N,), where p(x) ~ exp(-E(x))."""

    def score(x: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            y = _with_grad(x)
            (gradient,) = torch.autograd.grad(
                energy(y).sum(), y, create_graph=differentiable, materialize_grads=True
            )
        return -gradient

    return score


def explicit(score: Score, x: Tensor, true_score: Tensor) -> Tensor:
    """Computes the explicit score matching loss (Hyvarinen 2005, equation 2).

    l_n = 1/2 || s(x) - grad log p(x) ||^2

    Args:
        true_score: grad log p(x), shape of x.
    """
    return _half_square(score(x) - true_score)


def implicit(score: Score, x: Tensor) -> Tensor:
    """Computes the implicit score matching loss (Hyvarinen 2005, equation 4).

    l_n = tr(ds/dx) + 1/2 || s(x) ||^2

    The trace is exact and costs D backward passes. On average over data, explicit - implicit =
    1/2 E || grad log p ||^2.
    """
    with torch.enable_grad():
        y = _with_grad(x)
        s = score(y)
        trace = torch.zeros(len(y), dtype=s.dtype, device=s.device)
        for d in range(math.prod(y.shape[1:])):
            trace = trace + _gradient(s.flatten(1)[:, d].sum(), y).flatten(1)[:, d]
        loss = trace + _half_square(s)
    return loss if torch.is_grad_enabled() else loss.detach()


def sliced(
    score: Score,
    x: Tensor,
    *,
    n_slices: int = 1,
    slices: Slices = "rademacher",
    variance_reduced: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes the sliced score matching loss, a mean over random directions v (slices).

    l_n = v^T (ds/dx) v + 1/2 (v^T s)^2

    With `variance_reduced`, 1/2 || s ||^2 replaces its estimate 1/2 (v^T s)^2 (Song et al. 2019,
    "Sliced score matching", equations 7 and 8). On average both equal the implicit loss; each slice
    costs one backward pass. Despite its name, the second form has the larger variance where v^T
    (ds/dx) v and (v^T s)^2 are negatively correlated.

    Args:
        n_slices: number of directions v per sample.
        slices: "gaussian" (N(0, I)), "rademacher" (random signs) or "sphere" (uniform on the sphere
            of radius sqrt(D)); E v v^T = I for each.
        generator: generator of the slices, which are drawn on its device; None for torch's default.
    """
    if n_slices < 1:
        raise ValueError(f"n_slices must be at least 1; got {n_slices}")
    with torch.enable_grad():
        y = _with_grad(x)
        s = score(y)
        loss = torch.zeros(len(y), dtype=s.dtype, device=s.device)
        for _ in range(n_slices):
            v = random_slices(slices, y, generator)
            projection = (v * s).flatten(1).sum(1)
            loss = loss + (_gradient(projection.sum(), y) * v).flatten(1).sum(1) / n_slices
            if not variance_reduced:
                loss = loss + 0.5 * projection.square() / n_slices
        if variance_reduced:
            loss = loss + _half_square(s)
    return loss if torch.is_grad_enabled() else loss.detach()


def random_slices(kind: Slices, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws directions v with E v v^T = I per sample.

    Shape, dtype and device are those of `like` (N, ...).
    """
    device = like.device if generator is None else generator.device
    if kind == "rademacher":
        draw = torch.randint(2, like.shape, generator=generator, device=device)
        return (2 * draw - 1).to(like)
    if kind not in ("gaussian", "sphere"):
        raise ValueError(f"slices must be 'gaussian', 'rademacher' or 'sphere'; got {kind!r}")
    v = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like)
    if kind == "gaussian":
        return v
    norm = v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
    return v * (math.sqrt(math.prod(v.shape[1:])) / norm)


def denoising(score: Score, x: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
    """Computes the denoising score matching loss for given noise (Vincent 2011).

    l_n = 1/2 || s(x + sigma z) + z / sigma ||^2; its minimiser is the score of the data plus
    N(0, sigma^2).

    Args:
        x: clean data (N, ...).   sigma: a number, or (N,).   noise: standard normal z, shape of x.
    """
    if isinstance(sigma, Tensor) and sigma.ndim == 1:
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    s = score(x + sigma * noise)
    return _half_square(s + noise / sigma)


def denoising_score_matching(
    score_at: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    level: Tensor,
    noise: Tensor,
    *,
    anneal_power: float = 2.0,
) -> Tensor:
    """Computes the denoising score matching loss over noise levels, one per sample (N,).

    l_n = 1/2 sigma^p || s(x + sigma z, level) + z / sigma ||^2, summed over pixels (Vincent 2011;
    Song & Ermon 2019, equation 5, with lambda(sigma) = sigma^p).

    Args:
        score_at: (x, level) -> score, shape of x.
        x: clean data (N, ...).   sigmas: (L,).   level: (N,) int64.
        noise: standard normal z, shape of x.
        anneal_power: p; 2 gives all levels equal weight.
    """
    sigma = sigmas[level]
    losses = denoising(lambda y: score_at(y, level), x, sigma, noise)
    return losses * sigma**anneal_power


def random_levels(n: int, n_sigmas: int, generator: torch.Generator) -> Tensor:
    """Draws levels (n,) int64, uniform on 0 .. n_sigmas - 1."""
    return torch.randint(n_sigmas, (n,), generator=generator)


def levels_of(uniform: Tensor, n_sigmas: int) -> Tensor:
    """Maps uniforms in [0, 1) to levels 0 .. n_sigmas - 1, int64, shape of the uniforms."""
    return (uniform.double() * n_sigmas).long()


def _half_square(residual: Tensor) -> Tensor:
    """Computes 1/2 || r ||^2 per sample (N,), at least in float32 (bfloat16 sums lose too much)."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    return 0.5 * residual.to(wide).square().flatten(1).sum(dim=1)


def _with_grad(x: Tensor) -> Tensor:
    """Returns x if it requires grad, else a detached copy that does."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """Computes the gradient of value with respect to x, differentiable; 0 if independent of x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
    return gradient


def continuous_score_matching(
    score_at_time: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    std: Tensor,
    noise: Tensor,
) -> Tensor:
    """Computes the denoising score matching loss at continuous times, one loss per sample (N,).

    l_n = || std(t) s(x + std(t) z, t) + z ||^2, summed over pixels, without a factor 1/2 (Song et
    al. 2021, equation 7, with lambda(t) = std(t)^2, as in the tutorial). The training loss is the
    mean over n; a zero score has l_n = number of pixels, on average.

    Args:
        score_at_time: (x, t) -> score, shape of x.
        x: clean data (N, C, H, W).   t: (N,) in (0, 1].   std: (N,) noise level at t.
        noise: standard normal z, shape of x.
    """
    std = std[:, None, None, None]
    residual = (score_at_time(x + std * noise, t) * std + noise).float()
    return residual.square().flatten(1).sum(dim=1)


def times_of(uniform: Tensor, t_min: float) -> Tensor:
    """Maps uniforms in [0, 1) to times in [t_min, 1), float32, shape of the uniforms."""
    return t_min + (1 - t_min) * uniform


def weighted_score_matching(
    scaled_score_at: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """Computes the weighted denoising score matching loss at any noise levels, per sample (N,).

    l_n = weight_n || sigma_n s(x + sigma_n z, sigma_n) + z ||^2, summed over pixels. In terms of
    the denoiser D = x + sigma^2 s, the norm is || D - x_0 || / sigma (Karras et al. 2022, equation
    2).

    Args:
        scaled_score_at: (x, sigma) -> sigma score, shape of x.
        x: clean data (N, ...).   sigma, weight: (N,).   noise: standard normal z, shape of x.
    """
    row = (-1, *[1] * (x.ndim - 1))
    residual = scaled_score_at(x + sigma.view(row) * noise, sigma) + noise
    return 2 * weight * _half_square(residual)
