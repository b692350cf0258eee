"""Target distributions of Markov chains: an unnormalised density, or its score alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Target:
    """Distribution to sample from, given by an unnormalised density or by its score alone.

    Attributes:
        score: x (N, ...) -> grad log p, shape of x.
        log_density: x (N, ...) -> (N,), up to a constant. Without `score`, autograd computes it.
        n_points: without `log_density`, log p(y) - log p(x) is the integral of the score along the
            straight line from x to y, by Gauss-Lobatto quadrature at this many points. The two ends
            are known anyway; each further point costs an evaluation per proposal. It is exact where
            the score along the line is a polynomial of degree 2 n_points - 3 (2 points: Gaussians).
            A score that is not a gradient has no density: the samples are then approximate.
    """

    score: Callable[[Tensor], Tensor] | None = None
    log_density: Callable[[Tensor], Tensor] | None = None
    n_points: int = 3

    def __post_init__(self) -> None:
        if self.score is None and self.log_density is None:
            raise ValueError("a target needs a score, a log_density, or both")
        if self.n_points < 2:
            raise ValueError(f"n_points must be at least 2 (the ends); got {self.n_points}")

    @property
    def extra_nfe(self) -> int:
        """Evaluations per proposal beyond those of the leapfrog steps."""
        return 0 if self.log_density is not None else self.n_points - 2

    def at(self, x: Tensor) -> Point:
        """Evaluates the score at x, and the log density if it is known."""
        value = None
        if self.score is not None:
            s = self.score(x).detach()
            if self.log_density is not None:
                value = self.log_density(x).detach()
            return Point(x, s, value)
        assert self.log_density is not None
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            log_p = self.log_density(y)
            s = torch.zeros_like(y)
            if log_p.requires_grad:  # a constant density, as in a box, has none
                (s,) = torch.autograd.grad(log_p.sum(), y, materialize_grads=True)
        return Point(x, s.detach(), log_p.detach())

    def difference(self, a: Point, b: Point) -> Tensor:
        """Computes log p(b) - log p(a), (N,)."""
        if a.log_p is not None and b.log_p is not None:
            return b.log_p - a.log_p
        assert self.score is not None
        way = b.x - a.x
        nodes, weights = lobatto(self.n_points)
        mean = weights[0] * (a.score + b.score)
        for node, weight in zip(nodes[1:-1], weights[1:-1], strict=True):
            mean = mean + weight * self.score(a.x + node * way).detach()
        return row_sums(mean * way)


@dataclasses.dataclass
class Point:
    """States (N, ...), their scores, and their log densities (N,) if known."""

    x: Tensor
    score: Tensor
    log_p: Tensor | None

    def replaced(self, accepted: Tensor, other: Point) -> Point:
        """Returns `other` where accepted (N,), this point elsewhere."""
        keep = per_sample(accepted, self.x)
        log_p = None
        if self.log_p is not None and other.log_p is not None:
            log_p = torch.where(accepted, other.log_p, self.log_p)
        x = torch.where(keep, other.x, self.x)
        return Point(x, torch.where(keep, other.score, self.score), log_p)


def lobatto(n: int) -> tuple[list[float], list[float]]:
    """Returns nodes and weights of Gauss-Lobatto quadrature on [0, 1].

    The nodes are 0, 1 and the roots of P'_{n-1}.
    """
    legendre = np.polynomial.legendre.Legendre.basis(n - 1)
    inner = np.sort(legendre.deriv().roots().real) if n > 2 else np.zeros(0)
    inner = (inner - inner[::-1]) / 2  # exactly symmetric, so that both directions agree bitwise
    nodes = np.concatenate([[-1.0], inner, [1.0]])
    weights = 2 / (n * (n - 1) * legendre(nodes) ** 2)
    weights = (weights + weights[::-1]) / 2
    return ((1 + nodes) / 2).tolist(), (weights / 2).tolist()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes values (N,) to multiply `like` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def rows(x: Tensor) -> Tensor:
    """Reshapes (N, ...) to (N, D); scalar chains (N,) have D = 1."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def row_sums(x: Tensor) -> Tensor:
    """Sums over each sample, (N,) float64."""
    return rows(x).to(torch.float64).sum(1)
