"""Transposed convolutions as convolutions, whose weights are packed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.engines.lowering.graph import (
    ConvolutionSpec,
    Graph,
    Map,
    Op,
    SquaresSpec,
    TransposedSpec,
)


def expand_transposed(graph: Graph) -> None:
    """Makes transposed convolutions of stride s convolutions of s^2 times the channels.

    Pixel s q + r - padding of the output reads pixels q - j of x through taps r + s j. For a given
    remainder r of both axes that is a convolution with a part of the kernel; all s^2 together are
    one, whose groups of channels are the pixels of squares of s x s. No product is wasted, but for
    kernels whose size is no multiple of s: zeros follow them. With stride 1 the
    convolution is the output. Those with a kernel for each channel have a kernel of ours.
    """
    ops: list[Op] = []
    for op in graph.ops:
        spec = op.spec
        if not isinstance(spec, TransposedSpec) or not _expands(spec):
            ops.append(op)
        elif spec.stride == 1:
            ops.append(Op("conv", op.name, op.inputs, op.outputs, spec=_flipped(spec)))
        else:
            x = op.inputs[0]
            conv = _parts(spec)
            z = Map(conv.channels, conv.size(x.height), conv.size(x.width))
            squares = SquaresSpec(spec.stride, spec.padding)
            name = f"{op.name}.depth_to_space"
            ops.append(Op("conv", op.name, op.inputs, (z,), spec=conv))
            ops.append(Op("depth_to_space", name, (z,), op.outputs, spec=squares))
    graph.ops = ops


def is_depthwise(spec: TransposedSpec) -> bool:
    """Whether each channel has a kernel of its own, without holes."""
    return spec.groups == len(spec.weight) == spec.channels and spec.dilation == 1


def _expands(spec: TransposedSpec) -> bool:
    taps = spec.weight.shape[2]
    if spec.groups > 1:
        return False
    if spec.stride == 1:
        return spec.dilation * (taps - 1) >= spec.padding and not spec.output_padding
    return spec.dilation == 1


def _flipped(spec: TransposedSpec) -> ConvolutionSpec:
    weight = spec.weight.detach().flip(2, 3).transpose(0, 1).contiguous()
    padding = spec.dilation * (weight.shape[2] - 1) - spec.padding
    return ConvolutionSpec(weight, spec.bias, padding, spec.dilation)


def _parts(spec: TransposedSpec) -> ConvolutionSpec:
    """Returns the convolution that computes the pixels of a square as groups of channels."""
    s, (cin, cout, taps, _) = spec.stride, spec.weight.shape
    behind = max(0, spec.output_padding - spec.padding)  # rows that no pixel of x reaches
    reach = -(-(taps + behind) // s)
    more = reach * s - taps
    weight = F.pad(spec.weight.detach(), (0, more, 0, more))
    # Of both axes: tap r + s j, with j from the last to the first.
    parts = weight.view(cin, cout, reach, s, reach, s).flip(2, 4).permute(3, 5, 1, 0, 2, 4)
    bias: Tensor | None = None if spec.bias is None else spec.bias.detach().repeat(s * s)
    return ConvolutionSpec(parts.reshape(s * s * cout, cin, reach, reach), bias, reach - 1)
