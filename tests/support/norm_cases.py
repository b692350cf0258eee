"""Adversarial inputs of instance normalisation++, for the tests of all its kernels."""

import torch
from torch import Tensor


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checkerboard(n: int, c: int, height: int, width: int) -> Tensor:
    sign = 1 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)
    return 512.0 * sign.expand(n, c, height, width) + noise_like(n, c, 1, 1)


def some_constant(x: Tensor) -> Tensor:
    x[:, ::2] = 0.1 * torch.arange(x.shape[1])[::2, None, None]
    return x


def one_spike(x: Tensor) -> Tensor:
    x[:, :, 0, 0] = 1e4
    return x


INPUTS = {
    "offset": lambda: noise_like(3, 5, 16, 16) * 1.7 - 2.3,
    "large offset": lambda: noise_like(2, 32, 16, 16) + 1e3,
    "offset by channel": lambda: noise_like(2, 20, 9, 9) + noise_like(20, 1, 1) * 50,
    "amplitude 512": lambda: checkerboard(2, 6, 16, 16),
    "small amplitude": lambda: noise_like(2, 7, 8, 8) * 1e-4 + 3e-3,
    "constant channels": lambda: some_constant(noise_like(2, 8, 7, 7)),
    "first element an outlier": lambda: one_spike(noise_like(2, 16, 16, 16)),
    "prime sizes": lambda: noise_like(3, 37, 7, 11) - 2.3,
    "wide": lambda: noise_like(2, 131, 5, 5) - 2.3,
    "several tiles": lambda: noise_like(1, 3, 97, 101) - 2.3,
    "many channels": lambda: noise_like(1, 9001, 1, 3) - 2.3,
    "one channel": lambda: noise_like(3, 1, 9, 9) - 2.3,
    "one pixel": lambda: noise_like(3, 19, 1, 1) - 2.3,
    "one element": lambda: noise_like(1, 1, 1, 1) - 2.3,
}


def parameters(n: int, c: int, per_sample: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shape = (n, c) if per_sample else (c,)
    return tuple(noise_like(*shape, seed=k) * 0.5 + offset for k, offset in enumerate((1, 1, 0.1)))


def worst(y: Tensor, exact: Tensor) -> float:
    """Returns the largest absolute error."""
    return (y.cpu().double() - exact.cpu()).abs().max().item() if y.numel() else 0.0


def sensitivity(x: Tensor, alpha: Tensor, gamma: Tensor) -> float:
    """Returns the change of y if every mean is off by 2^-26 of the largest |x| (float32 sums)."""
    means = x.double().mean(dim=(2, 3))
    across = means.var(dim=1) if x.shape[1] > 1 else torch.zeros(len(x)).double()
    within = x.double().var(dim=(2, 3), correction=0)
    slopes = (within + 1e-5).rsqrt() + alpha.abs() * (across + 1e-5).rsqrt()[:, None]
    return float(2.0**-26 * x.abs().max() * (gamma.abs() * slopes).max())
