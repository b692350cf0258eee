"""Operations of a plan that PyTorch runs: what no kernel of ours covers on a device.

Each function takes a plan's memory and an operation, and returns a function that computes the
outputs in that memory. PyTorch may allocate what it computes before it is copied there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ncsn_fast.engines.lowering.export import on_device, read_by_host
from ncsn_fast.engines.lowering.graph import (
    ActivationSpec,
    AttentionSpec,
    ConvolutionSpec,
    CopySpec,
    Graph,
    GroupNormSpec,
    Op,
    PadSpec,
    ProductSpec,
    SoftmaxSpec,
    SquaresSpec,
    TorchSpec,
    TransposedSpec,
    View,
)
from ncsn_fast.engines.lowering.static_memory import StaticMemory
from ncsn_fast.ops import reference
from ncsn_fast.ops.activations import ACTIVATIONS

Step = Callable[[], object]


def step(plan: StaticMemory, op: Op) -> Step:
    """Returns the function that runs an operation."""
    return TABLE[op.kind](plan, op)


def waits_for_host(graph: Graph) -> str | None:
    """Returns an operation of PyTorch that needs a number on the host, and where; None if none."""
    programs = {op.name: op.spec.program for op in graph.ops if isinstance(op.spec, TorchSpec)}
    if graph.condition is not None:
        programs["its conditions"] = graph.condition
    for name, program in programs.items():
        if (target := read_by_host(program)) is not None:
            return f"{target} in {name}"
    return None


def _leaky_relu(plan: StaticMemory, op: Op) -> Step:
    """y = x where x > 0, else slope x."""
    assert isinstance(op.spec, ActivationSpec)
    x, y, slope = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0]), op.spec.slope
    return lambda: y.copy_(F.leaky_relu(x, slope))


def _pad(plan: StaticMemory, op: Op) -> Step:
    """x with rows and columns of zeros around it."""
    spec = op.spec
    assert isinstance(spec, PadSpec)
    x, y = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    height, width = x.shape[2:]
    inner = y[:, :, spec.top : spec.top + height, spec.left : spec.left + width]

    def run() -> None:
        y.zero_()
        inner.copy_(x)

    return run


def _copy(plan: StaticMemory, op: Op) -> Step:
    assert isinstance(op.spec, CopySpec)
    x, y = plan.view(op.spec.source), plan.view(op.spec.target)
    return lambda: y.copy_(x)


def _concat(plan: StaticMemory, op: Op) -> Step:
    """Maps side by side, along channels."""
    xs, y = [*map(plan.tensor, op.inputs)], plan.tensor(op.outputs[0])
    return lambda: torch.cat(xs, dim=1, out=y)


def _nearest(plan: StaticMemory, op: Op) -> Step:
    x, y = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    size = list(y.shape[2:])
    run = torch.ops.aten.upsample_nearest2d.out
    return lambda: run(x, size, out=y)


def _convolution(plan: StaticMemory, op: Op) -> Step:
    """Convolution, in the maps' type."""
    spec = op.spec
    assert isinstance(spec, ConvolutionSpec)
    weight, *bias = plan.plain(op.name, spec.kernel(), spec.bias)
    x, y = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    settings = (spec.stride, spec.padding, spec.dilation, spec.groups)
    return lambda: y.copy_(F.conv2d(x, weight, bias[0] if bias else None, *settings))


def _conv_transpose(plan: StaticMemory, op: Op) -> Step:
    """Transposed convolution."""
    spec = op.spec
    assert isinstance(spec, TransposedSpec)
    weight, *bias = plan.plain(op.name, spec.weight, spec.bias)
    x, y = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    settings = (spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation)
    shift, kind = bias[0] if bias else None, plan.arithmetic
    return lambda: y.copy_(F.conv_transpose2d(x.to(kind), weight, shift, *settings))


def _layer_norm(plan: StaticMemory, op: Op) -> Step:
    """Norm of each pixel over its channels, and its activation."""
    spec, (m,), y = op.spec, op.inputs, plan.tensor(op.outputs[0])
    assert isinstance(spec, GroupNormSpec)
    x = plan.tensor(m).permute(0, 2, 3, 1)
    weight, bias = (
        None if p is None else plan.plain(f"{op.name} {name}", p)[0]
        for name, p in (("weight", spec.weight), ("bias", spec.bias))
    )
    activation, shape = ACTIVATIONS[spec.activation or "none"].function, [m.channels]
    target = y.permute(0, 2, 3, 1)
    return lambda: target.copy_(activation(F.layer_norm(x, shape, weight, bias, spec.eps)))


def _attention(plan: StaticMemory, op: Op) -> Step:
    """softmax(scale q k^T) v of each head."""
    spec = op.spec
    assert isinstance(spec, AttentionSpec)
    q, k, v = map(plan.view, (spec.query, spec.key, spec.value))
    y = plan.view(attended(op))
    run = F.scaled_dot_product_attention
    return lambda: y.copy_(run(q, k, v, scale=spec.scale))


def _product(plan: StaticMemory, op: Op) -> Step:
    """y = a b of each head."""
    spec = op.spec
    assert isinstance(spec, ProductSpec)
    a, b, y = map(plan.view, (spec.a, spec.b, spec.y))
    kind = plan.arithmetic
    return lambda: y.copy_(a.to(kind) @ b.to(kind))


def _softmax(plan: StaticMemory, op: Op) -> Step:
    """Softmax of scale * x of each row, in float32 whatever the maps' type."""
    spec = op.spec
    assert isinstance(spec, SoftmaxSpec)
    shape, strides = (spec.rows, spec.columns), (spec.columns, 1)
    x, y = (plan.view(View(m, shape, strides)) for m in (op.inputs[0], op.outputs[0]))
    return lambda: y.copy_((x.float() * spec.scale).softmax(dim=-1))


def _depth_to_space(plan: StaticMemory, op: Op) -> Step:
    """Squares of pixels from groups of channels."""
    spec = op.spec
    assert isinstance(spec, SquaresSpec)
    z, y = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    size = (y.shape[2], y.shape[3])
    return lambda: y.copy_(reference.depth_to_space(z, spec.factor, size=size, first=spec.first))


def attended(op: Op) -> View:
    """Returns the output of an attention as (heads, L, d)."""
    spec = op.spec
    assert isinstance(spec, AttentionSpec)
    heads, length, _ = spec.query.shape
    across = spec.value.shape[2]
    return View(op.outputs[0], (heads, length, across), (across, heads * across, 1))


def _program(plan: StaticMemory, op: Op) -> Step:
    """Nodes of the exported network, in float32 whatever the maps' type."""
    spec = op.spec
    assert isinstance(spec, TorchSpec)
    module, batch = on_device(spec.program, plan.device), plan.batch
    vectors = [
        plan.vector(v).view(batch, *shape)
        for v, shape in zip(spec.vectors, spec.shapes, strict=True)
    ]
    constants = [*vectors, *map(plan.constant, spec.parameters)]
    inputs, outputs = ([*map(plan.view, views)] for views in (spec.inputs, spec.outputs))

    def run() -> None:
        computed = module(batch, *(x.float() for x in inputs), *constants)
        for y, value in zip(outputs, computed, strict=True):
            y.copy_(value)

    return run


TABLE: dict[str, Callable[[StaticMemory, Op], Step]] = {
    "leaky_relu": _leaky_relu,
    "pad": _pad,
    "copy": _copy,
    "concat": _concat,
    "nearest2": _nearest,
    "conv": _convolution,
    "conv_transpose": _conv_transpose,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "product": _product,
    "softmax": _softmax,
    "depth_to_space": _depth_to_space,
    "torch": _program,
}
