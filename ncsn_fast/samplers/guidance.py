"""Guides: conversion of a model's score into a conditional score, for every sampler.

A guide maps score(x, sigma) to another such function. With the denoised image
D(x) = x + sigma^2 score(x, sigma) = E[x_0 | x],
    Projected    D' = D + A^T (A A^T + (sigma_y / r)^2 I)^-1 (y - A D)
                 score' = (D' - x) / sigma^2,  r^2 = sigma^2 / (1 + (sigma / spread)^2)
    Conditional  score' = score + scale * grad_x log p(label | x, sigma)
`Projected` conditions samples on a measurement y = A x_0 + sigma_y z. For sigma_y = 0 it is
range-null space sampling (DDNM, Wang et al., ICLR 2023): the last denoised image satisfies the
measurement. With noise it is Bayes' rule for x_0 given x, approximated as N(D, r^2 I), as in PiGDM
(Song et al., ICLR 2023) but without its Jacobian; exact for data N(m, spread^2 I).
`Conditional` is Bayes' rule (Song et al. 2021, appendix I); exact for an exact classifier of noisy
images.

`Imposed` is not a guide but a Constraint: it replaces the measured part of the states at every
step, as in published inpainting and colourisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.samplers.operators import Operator
from ncsn_fast.samplers.procedure import Guide, Score, per_sample


@dataclasses.dataclass(frozen=True, eq=False)
class Projected:
    """Guide towards samples that satisfy the measurements y; see the module docstring.

    Args:
        measurements: y (N, ...), one row per sample.
        noise: sigma_y, the standard deviation of the noise on them, in their unit.
        spread: the data's standard deviation; used only if noise > 0. PiGDM takes 1 for images in
            [-1, 1], which is 0.5 here. That gives too little weight to measurements of many pixels,
            which vary far more than single pixels; held-out digits come out better without a limit.
    """

    operator: Operator
    measurements: Tensor
    noise: float = 0.0
    spread: float = math.inf

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        square = per_sample(sigma.square(), x)
        denoised = x + square * score(x, sigma)
        damping: Tensor | float = 0.0
        if self.noise:
            damping = self.noise**2 * (sigma.double() ** -2 + self.spread**-2)
        return (self.operator.correct(denoised, self.measurements, damping) - x) / square

    def __len__(self) -> int:
        return len(self.measurements)

    def rows(self, index: Tensor, device: torch.device) -> Projected:
        return dataclasses.replace(
            self,
            operator=self.operator.rows(index, device),
            measurements=self.measurements[index].to(device),
        )


# (x, sigma, labels) -> grad_x log p(label | x, sigma), shape of x.
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Conditional:
    """Guide towards a class, or any other condition with a gradient; see the module docstring.

    Args:
        gradient: (x, sigma, labels) -> grad_x log p(label | x, sigma); `classifier_gradient`
            returns one for a classifier.
        labels: (N, ...), one row per sample.
        scale: 1 is Bayes' rule; a larger scale sharpens samples and reduces their variety.
    """

    gradient: Gradient
    labels: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite; got {self.scale}")

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        return score(x, sigma) + self.scale * self.gradient(x, sigma, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor, device: torch.device) -> Conditional:
        return dataclasses.replace(self, labels=self.labels[index].to(device))


def classifier_gradient(logits: Callable[[Tensor, Tensor], Tensor]) -> Gradient:
    """Returns grad_x log softmax(logits(x, sigma))[label] for labels (B,) int64, by autograd.

    Args:
        logits: (x (B, C, H, W), sigma (B,)) -> (B, K), sample by sample: a classifier trained on
            noisy images.
    """

    def gradient(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        # Engines run in inference mode; autograd rejects its tensors, so it gets copies.
        with torch.inference_mode(False), torch.enable_grad():
            at = x.clone().requires_grad_()
            found = logits(at, sigma.clone())
            if found.ndim != 2 or len(found) != len(x):
                raise ValueError(
                    f"a classifier must return logits ({len(x)}, K); got {tuple(found.shape)}"
                )
            chosen = found.log_softmax(dim=1).gather(1, labels.clone()[:, None])
            return torch.autograd.grad(chosen.sum(), at)[0]

    return gradient


def check_labels(
    labels: Tensor,
    logits: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int, int],
    device: torch.device,
) -> None:
    """Raises ValueError unless labels (N,) are integer classes of a classifier.

    The number of classes comes from one call of the classifier. On a GPU, a label out of range
    would abort the process.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise ValueError(f"labels must be integers (N,); got {labels.dtype} {tuple(labels.shape)}")
    with torch.no_grad():
        found = logits(torch.zeros(1, *shape, device=device), torch.ones(1, device=device))
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"a classifier must return logits (1, K) for one image; got {got}")
    classes = found.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in [0, {classes}), the classifier's classes; got "
            f"{int(labels.min())} .. {int(labels.max())}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Both:
    """Two guides in sequence: `second` changes the score that `first` returns.

    A projection must come last, since the next guide would undo it.
    """

    first: Guide
    second: Guide

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        return self.second.score(lambda x, sigma: self.first.score(score, x, sigma), x, sigma)

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, index: Tensor, device: torch.device) -> Both:
        return Both(self.first.rows(index, device), self.second.rows(index, device))


@dataclasses.dataclass(frozen=True, eq=False)
class Imposed:
    """Constraint that replaces the measured part of noisy states.

    x + A^T (A A^T)^-1 (y + sigma A z - A x)

    With a mask it is the published inpainting, with the grey channel the published colourisation.

    Args:
        measurements: y (N, ...), one row per sample; without noise.
    """

    operator: Operator
    measurements: Tensor

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        y = self.measurements
        if sigma and z is not None:
            y = y + sigma * self.operator.apply(z.to(y.dtype))
        return self.operator.correct(x, y)

    def rows(self, index: Tensor, device: torch.device) -> Imposed:
        return Imposed(self.operator.rows(index, device), self.measurements[index].to(device))


def variance_preserving(std: Tensor) -> Tensor:
    """Computes m of a VP-SDE with noise `std`: m^2 + std^2 = 1 (sub-VP: m^2 + std = 1)."""
    return (1 - std.double().square()).sqrt()


@dataclasses.dataclass(frozen=True, eq=False)
class Shrunk:
    """Guide or constraint for states x = m x_0 + std z, whose mean shrinks, as in VP-SDEs.

    u = x / m is x_0 with noise sigma = std / m, and grad log p(u) = m grad log p(x); the inner
    guide or constraint sees u at sigma.

    Args:
        inner: a Guide or a Constraint.
        mean_scale: m as a function of std, both (B,).
    """

    inner: Any
    mean_scale: Callable[[Tensor], Tensor] = variance_preserving

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        """Computes the guided score of x from the score of x, at noise levels sigma = std (B,)."""
        scale = self.mean_scale(sigma)
        m = per_sample(scale, x)

        def unshrunk(u: Tensor, _: Tensor) -> Tensor:
            return m * score(m * u, sigma)

        return self.inner.score(unshrunk, x / m, (sigma / scale).to(sigma.dtype)) / m

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        """Returns x with the constraint imposed at noise sigma = std."""
        m = float(self.mean_scale(torch.tensor(sigma, dtype=torch.float64)))
        return m * self.inner.impose(x / m, sigma / m, z)

    def __len__(self) -> int:
        return len(self.inner)

    def rows(self, index: Tensor, device: torch.device) -> Shrunk:
        return Shrunk(self.inner.rows(index, device), self.mean_scale)


def _check_noise(noise: float) -> None:
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite; got {noise}")
