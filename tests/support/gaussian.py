"""Programs on Gaussian data, where the score is linear and the moments follow a recursion."""

from __future__ import annotations

import dataclasses

import numpy as np

from ncsn_fast.samplers.program import Program


@dataclasses.dataclass(frozen=True)
class Data:
    """One pixel of N(mean, variance I); scale is E[x(t) | x(0)] / x(0) at each row, or 1."""

    mean: float = 0.0
    variance: float = 0.25
    scale: object = 1.0

    def slope(self, program: Program) -> tuple[np.ndarray, np.ndarray]:
        """Returns (K,) slope and centre with f = sigma * score = slope (x - centre) at each row."""
        scale = np.broadcast_to(np.asarray(self.scale, dtype=np.float64), program.sigma.shape)
        slope = -program.sigma / (scale**2 * self.variance + program.sigma**2)
        return slope, scale * self.mean


def moments(
    program: Program, data: Data, mean: float = 0.0, variance: float | None = None
) -> tuple[float, float]:
    """Computes mean and variance of x after the last row, from N(mean, variance).

    variance None: the prior's.

    (x, h) goes through x' = a x + b f + g h + c z, h' = p x + q f, which is affine in both.
    """
    slope, centre = data.slope(program)
    state = np.array([mean, 0.0])
    covariance = np.diag([program.sigma[0] ** 2 if variance is None else variance, 0.0])
    for k in range(program.nfe):
        a, b, g, c, p, q, _, _ = program.coefficients(k)
        step = np.array([[a + b * slope[k], g], [p + q * slope[k], 0.0]])
        state = step @ state - np.array([b, q]) * slope[k] * centre[k]
        covariance = step @ covariance @ step.T + np.diag([c**2, 0.0])
    return float(state[0]), float(covariance[0, 0])


def follow(program: Program, data: Data, x: float) -> float:
    """Returns the final x of a run without noise."""
    return moments(program, data, mean=x, variance=0.0)[0]
