"""Inputs of group normalisation, for the tests of all its kernels: adversarial maps and options."""

from typing import Any

import torch
from norm_cases import INPUTS, noise_like
from torch import Tensor

# Groups of each of norm_cases' inputs; its channels are prime in some.
GROUPS = {
    "offset": 1,
    "large offset": 8,
    "offset by channel": 5,
    "amplitude 512": 3,
    "small amplitude": 7,
    "constant channels": 8,
    "first element an outlier": 4,
    "prime sizes": 37,
    "wide": 1,
    "several tiles": 1,
    "many channels": 1,
    "one channel": 1,
    "one pixel": 1,
    "one element": 1,
}
assert GROUPS.keys() == INPUTS.keys()

VARIANTS = ("plain", "affine", "add", "modulated", "all")


def options(n: int, c: int, variant: str) -> dict[str, Tensor]:
    """Parameters of a variant; float32."""
    named: dict[str, Tensor] = {}
    if variant != "plain":
        named |= {"gamma": noise_like(c, seed=1) * 0.5 + 1, "beta": noise_like(c, seed=2) * 0.5}
    if variant in ("add", "all"):
        named["add"] = noise_like(n, c, seed=3) * 2 + 1
    if variant in ("modulated", "all"):
        named |= {"scale": noise_like(n, c, seed=4) * 0.5, "shift": noise_like(n, c, seed=5)}
    return named


def slack(x: Tensor, groups: int, named: dict[str, Tensor]) -> float:
    """Returns the change of y if every mean is off by 2^-26 of the largest |x + add| (float32)."""
    h = x.double()
    if "add" in named:
        h = h + named["add"].double()[:, :, None, None]
    variance = h.reshape(len(h), groups, -1).var(dim=2, correction=0) if h.numel() else h
    slopes: Any = (variance + 1e-5).rsqrt().max() if h.numel() else 0.0
    for name, one in (("gamma", 0.0), ("scale", 1.0)):
        if name in named and named[name].numel():
            slopes = slopes * (named[name].double() + one).abs().max()
    largest = h.abs().max() if h.numel() else torch.zeros(())
    return float(2.0**-26 * largest * slopes)
