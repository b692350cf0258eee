"""Target N(0, I), and a test of the mean of independent values."""

import math

import torch

from ncsn_fast.samplers.targets import Target

GAUSSIAN = Target(log_density=lambda x: -0.5 * x.square().flatten(1).sum(1))  # N(0, I)
GAUSSIAN_SCORE = Target(score=torch.neg, n_points=2)


def start(n, d, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, d, generator=generator, dtype=torch.float64)


def assert_close_mean(values, expected, band=4.5):
    """Raises unless the mean of independent values (N,) is `expected`, within Monte-Carlo error."""
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - expected) < band * error + 1e-12, float(values.mean())
