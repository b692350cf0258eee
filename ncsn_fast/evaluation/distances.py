"""Distances between two sets of samples that need no labels: energy distance and MMD.

Both are D(x, y) = 2 E phi(|x - y|) - E phi(|x - x'|) - E phi(|y - y'|) for independent x, x' of one
distribution and y, y' of the other, estimated without bias by means over pairs; that may be below
0. phi(r) = r is the energy distance (Szekely & Rizzo 2013), and phi = -k the squared maximum mean
discrepancy of the kernel k(r) (Gretton et al. 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Phi = Callable[[Tensor], Tensor]
BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2)  # of MMD, in units of the scale
ELEMENTS = 1 << 23  # of a block in which distances are computed, in float64


class PairDistance:
    """Distance of samples to references, whose own part is computed once.

    Args:
        references: (M, ...), at least 2.
        kernel: "energy", or "mmd" for a sum of Gaussian kernels.
        scale: the length in whose units distances are measured; None for the mean distance between
            two references.
    """

    def __init__(
        self, references: Tensor, kernel: str = "energy", scale: float | None = None
    ) -> None:
        if kernel not in ("energy", "mmd"):
            raise ValueError(f"kernel must be 'energy' or 'mmd'; got {kernel!r}")
        self.references = references.flatten(1)
        self.scale = _mean_within(self.references, lambda r: r) if scale is None else scale
        if not 0 < self.scale < math.inf:
            raise ValueError("the references must be finite and differ from each other")
        self.phi: Phi = self._energy if kernel == "energy" else self._gaussians
        self._within = _mean_within(self.references, self.phi)

    def _energy(self, r: Tensor) -> Tensor:
        return r / self.scale

    def _gaussians(self, r: Tensor) -> Tensor:
        squares = (r / self.scale).square()
        return -sum((-squares / (2 * s * s)).exp() for s in BANDWIDTHS)  # type: ignore[return-value]

    def __call__(self, samples: Tensor) -> float:
        """Computes the distance of samples (N, ...), at least 2; it has no unit."""
        x = samples.flatten(1)
        across = _mean_across(x, self.references, self.phi)
        return 2 * across - _mean_within(x, self.phi) - self._within


def _mean_across(x: Tensor, y: Tensor, phi: Phi) -> float:
    """Returns the mean of phi over the distances of all pairs of x (N, F) and y (M, F)."""
    rows = max(1, ELEMENTS // x.shape[1])
    total = 0.0
    for part in x.split(rows):
        part = part.double()
        total += sum(float(phi(torch.cdist(part, other.double())).sum()) for other in y.split(rows))
    return total / (len(x) * len(y))


def _mean_within(x: Tensor, phi: Phi) -> float:
    """Returns the mean of phi over the distances of all pairs of different rows of x (N, F)."""
    n = len(x)
    if n < 2:
        raise ValueError(f"a distance of distributions needs 2 samples on each side; got {n}")
    diagonal = n * float(phi(torch.zeros((), dtype=torch.float64)))
    return (_mean_across(x, x, phi) * n * n - diagonal) / (n * (n - 1))


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Computes the squared MMD of features x (N, F), y (M, F) with the kernel (x.y / F + 1)^3.

    It is KID (Binkowski et al. 2018) of all features at once, instead of subsets. Unbiased.
    """
    n, m, width = len(x), len(y), x.shape[1]
    if min(n, m) < 2:
        raise ValueError(f"KID needs 2 samples on each side; got {n} and {m}")
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** 3

    def within(a: Tensor) -> float:
        return float(kernel(a, a).sum() - (a.square().sum(1) / width + 1).pow(3).sum())

    across = float(kernel(x, y).mean())
    return within(x) / (n * (n - 1)) + within(y) / (m * (m - 1)) - 2 * across
