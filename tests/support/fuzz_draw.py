"""Random inputs of a case of `gpu_fuzz.py`, and the check of its results."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

CHANNELS = (1, 2, 3, 5, 8, 16, 24, 31, 32, 64, 70, 128, 256)
GUARD = 64  # guard elements before and after a result: a multiple of 16 bytes


class Draw:
    """Random choices of one case, from its seed."""

    def __init__(self, seed: int, device: str, tiny: bool) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.tiny = device, tiny
        self.guards: list[tuple[str, Tensor, int]] = []
        self.chosen: dict[str, Any] = {}

    def choose(self, name: str, values: Any) -> Any:
        self.chosen[name] = self.random.choice(list(values))
        return self.chosen[name]

    def shape(self, *, even: bool = False) -> tuple[int, int, int, int]:
        """Draws (N, C, H, W) of a map, sometimes empty, often with odd sizes."""
        n = self.choose("n", (1, 2) if self.tiny else (0, 1, 2, 3, 5))
        c = self.choose("c", CHANNELS[:5] if self.tiny else CHANNELS)
        most = 4 if self.tiny else max(2, min(48, int(math.sqrt(2e5 / (max(n, 1) * c)))))
        height, width = (self.random.randint(1, most) for _ in range(2))
        if even:
            height, width = 2 * height, 2 * width
        self.chosen["size"] = (height, width)
        return n, c, height, width

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def map(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draws a channels-last map on the device, with random mean and spread.

        Sometimes a slice of a larger batch, or not aligned to 16 bytes.
        """
        scale = self.random.choice((1e-2, 1.0, 1.0, 30.0))
        x = (self.numbers(*shape) * scale + self.random.choice((0.0, -2.3, 20.0))).to(dtype)
        layout = self.choose("layout", ("plain", "plain", "slice", "offset"))
        n, c, height, width = shape
        if layout == "slice":
            whole = torch.full((n + 2, height, width, c), math.nan, dtype=dtype, device=self.device)
            view = whole[1 : n + 1].permute(0, 3, 1, 2)
        else:
            off = int(layout == "offset")
            flat = torch.full((x.numel() + off,), math.nan, dtype=dtype, device=self.device)
            view = flat[off:].view(n, height, width, c).permute(0, 3, 1, 2)
        view.copy_(x)
        return view

    def out(self, shape: tuple[int, ...], dtype: torch.dtype, name: str = "out") -> Tensor:
        """Allocates a channels-last result of NaN between guards of NaN."""
        n, c, height, width = shape
        size = math.prod(shape)
        flat = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=self.device)
        self.guards.append((name, flat, size))
        return flat[GUARD : GUARD + size].view(n, height, width, c).permute(0, 3, 1, 2)

    def affine(self, n: int, c: int) -> list[Tensor]:
        """Draws alpha, gamma, beta, each shared by all samples or one row per sample."""
        rows = [self.random.choice(((c,), (n, c))) for _ in range(3)]
        return [
            (self.numbers(*shape) * 0.5 + offset).to(self.device)
            for shape, offset in zip(rows, (1.0, 1.0, 0.1), strict=True)
        ]

    def check_guards(self) -> None:
        for name, flat, size in self.guards:
            ends = torch.cat((flat[:GUARD], flat[GUARD + size :]))
            assert bool(ends.isnan().all()), f"{name}: written outside of its memory"


def exact(x: Any) -> Any:
    return x.detach().cpu().double() if isinstance(x, Tensor) else x


def close(name: str, ours: Tensor, truth: Tensor, eager: Tensor | None, floor: float) -> None:
    """Raises unless the error is at most twice eager's, plus two roundings, plus `floor`.

    The roundings are of the largest value.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}"
    if truth.numel() == 0:
        return
    allowed = 2 * torch.finfo(ours.dtype).eps * float(truth.abs().max()) + floor
    if eager is not None:
        allowed += 2 * float((exact(eager) - truth).abs().max())
    error = float((exact(ours) - truth).abs().max())
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"  # false for NaN
