"""Data with a known score at every noise level, and the noise schedules of the tutorials."""

import math

import torch

from ncsn_fast.samplers.procedure import per_sample


class Gaussian:
    """Data N(mean, spread^2 I), smoothed by noise sigma; counts the calls of its score."""

    def __init__(self, mean=0.3, spread=0.5):
        self.mean, self.spread, self.calls = mean, spread, 0

    def score(self, x, sigma):
        assert sigma.shape == (len(x),)
        self.calls += 1
        return -(x - self.mean) / per_sample(self.spread**2 + sigma**2, x)

    def flow(self, x, sigma_from, sigma_to):
        """Returns where the probability flow takes x."""
        ratio = (self.spread**2 + sigma_to**2) / (self.spread**2 + sigma_from**2)
        return self.mean + (x - self.mean) * math.sqrt(ratio)

    def log_density(self, x, sigma):
        """Computes log p_sigma(x) in nats, (B,)."""
        variance = self.spread**2 + sigma**2
        squares = (x - self.mean).double().square().flatten(1)
        constant = 0.5 * squares.shape[1] * math.log(2 * math.pi * variance)
        return -0.5 * squares.sum(1) / variance - constant


class Geometric:
    """Schedule sigma(t) = low (high / low)^t and g(t)^2; the noise has variance sigma(t)^2 - floor.

    The course's tutorial starts from clean data (floor = low^2), score_sde does not (floor = 0).
    """

    def __init__(self, low, high, floor):
        self.low, self.rate, self.floor = low, math.log(high / low), floor

    def variance(self, t):
        """Computes v(t), by expm1 if it starts at zero, to avoid cancellation."""
        if self.floor:
            return self.low**2 * torch.expm1(2 * self.rate * torch.as_tensor(t).double())
        return self.low**2 * torch.exp(2 * self.rate * torch.as_tensor(t).double())

    def g2(self, t):
        return 2 * self.rate * self.low**2 * torch.exp(2 * self.rate * torch.as_tensor(t).double())


class Power:
    """Schedule dx = base^t dw (Song's tutorial): v(t) = (base^2t - 1) / (2 ln base)."""

    def __init__(self, base=25.0):
        self.rate = math.log(base)

    def variance(self, t):
        """Computes v(t), by expm1 to avoid cancellation."""
        return torch.expm1(2 * self.rate * torch.as_tensor(t).double()) / (2 * self.rate)

    def g2(self, t):
        return torch.exp(2 * self.rate * torch.as_tensor(t).double())


COURSE = Geometric(0.01, 22.0, floor=0.01**2)  # spec: tutorial A
SONG = Power(25.0)  # tutorial B
VESDE = Geometric(0.01, 50.0, floor=0.0)


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
