"""Operations of a plan that PyTorch runs: what no kernel of ours covers.

Each function takes tensors in the plan's memory and returns a function that computes the output.
Arithmetic is float32, whatever the maps' type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.engines.lowering.graph import GroupNormSpec, PadSpec, TransposedSpec

Step = Callable[[], object]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activate(kind: str, slope: float, x: Tensor) -> Tensor:
    """Applies an activation of lowering's table."""
    return F.leaky_relu(x, slope) if kind == "leaky_relu" else ACTIVATIONS[kind](x)


def activation(kind: str, slope: float, x: Tensor, y: Tensor) -> Step:
    """y = activation(x)."""
    return lambda: y.copy_(activate(kind, slope, x.float()))


def affine(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> Step:
    """y = scale x + shift, which broadcast to x."""
    return lambda: y.copy_(torch.addcmul(shift, x.float(), scale))


def add(inputs: Sequence[Tensor], total: Tensor | None, kind: str, y: Tensor | None) -> Step:
    """total = a + b, and y = activation(a + b); either may be left out."""
    a, b = inputs

    def run() -> None:
        s = a.float() + b.float()
        if total is not None:
            total.copy_(s)
        if y is not None:
            y.copy_(activate(kind, 0.0, s))

    return run


def concat(inputs: Sequence[Tensor], y: Tensor) -> Step:
    """y = the inputs' channels, one after another."""
    parts = y.split([x.shape[1] for x in inputs], dim=1)

    def run() -> None:
        for part, x in zip(parts, inputs, strict=True):
            part.copy_(x)

    return run


def nearest2(x: Tensor, y: Tensor) -> Step:
    """Each pixel as a square of four."""
    n, c, h, w = x.shape
    squares = y.permute(0, 2, 3, 1).view(n, h, 2, w, 2, c)
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    return lambda: squares.copy_(pixels)


def pad(x: Tensor, spec: PadSpec, y: Tensor) -> Step:
    """x with rows and columns of zeros around it."""
    height, width = x.shape[2:]
    inner = y[:, :, spec.top : spec.top + height, spec.left : spec.left + width]

    def run() -> None:
        y.zero_()
        inner.copy_(x)

    return run


def copy(x: Tensor, y: Tensor) -> Step:
    """y = x."""
    return lambda: y.copy_(x)


def group_norm(
    x: Tensor, spec: GroupNormSpec, parameters: Sequence[Tensor | None], y: Tensor
) -> Step:
    """Group norm as GroupNormSpec has it; parameters are weight, bias, add, scale, shift."""
    weight, bias, add, scale, shift = (
        p[:, :, None, None] if p is not None and p.ndim == 2 else p for p in parameters
    )

    def run() -> None:
        h = x.float()
        h = h if add is None else h + add
        h = F.group_norm(h, spec.groups, weight, bias, spec.eps)
        h = h if scale is None else h * scale
        h = h if shift is None else h + shift
        y.copy_(activate(spec.activation, spec.slope, h) if spec.activation else h)

    return run


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, y: Tensor) -> Step:
    """y = softmax(scale q k^T) v, each (N, heads, L, d)."""
    return lambda: y.copy_(
        F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale)
    )


def conv_transpose(
    x: Tensor, spec: TransposedSpec, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Step:
    """Transposed convolution, in the maps' type."""
    return lambda: y.copy_(
        F.conv_transpose2d(
            x, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups,
            spec.dilation,
        )
    )  # fmt: skip


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, spec: Any, y: Tensor) -> Step:
    """Convolution, in the maps' type."""
    return lambda: y.copy_(
        F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    )


def program(
    module: Callable[..., Sequence[Tensor]],
    batch: int,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> Step:
    """outputs = module(batch, *inputs, *constants)."""

    def run() -> None:
        computed = module(batch, *(x.float() for x in inputs), *constants)
        for y, value in zip(outputs, computed, strict=True):
            y.copy_(value)

    return run
