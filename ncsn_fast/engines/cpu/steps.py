"""Steps of a plan for every operation but convolutions: a kernel of ours, else PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.cpu.memory import PlanMemory
from ncsn_fast.engines.cpu.padding import PaddedMap, border_of
from ncsn_fast.engines.cpu.strip_sums import sums_among
from ncsn_fast.engines.lowering import torch_steps
from ncsn_fast.engines.lowering.graph import (
    ACTIVATIONS,
    ActivationSpec,
    AddSpec,
    AffineSpec,
    AttentionSpec,
    Factor,
    GroupNormSpec,
    NormSpec,
    Op,
    ProductSpec,
    SoftmaxSpec,
    SquaresSpec,
    TransposedSpec,
    Vector,
)
from ncsn_fast.engines.lowering.torch_steps import attended
from ncsn_fast.engines.lowering.transposed import is_depthwise
from ncsn_fast.ops.activations import activation_code
from ncsn_fast.ops.addresses import NONE, Array, array

Adder = Callable[[PlanMemory, Op], None]


def add(plan: PlanMemory, op: Op) -> None:
    """Appends the steps of an operation to a plan."""
    kind = "add" if op.kind.startswith("add_") else op.kind
    TABLE["activation" if kind in ACTIVATIONS else kind](plan, op)


def _norm(plan: PlanMemory, op: Op) -> None:
    spec, x, y = op.spec, op.inputs[0], op.outputs[0]
    assert isinstance(spec, NormSpec)
    rows = [plan.vector(v) for v in spec.vectors] or plan.float32(op.name, *spec.parameters)
    if spec.by_level:
        (table,) = rows
        rows = plan.level_rows(table, x.channels)
    each = rows[0].ndim == 2
    shape = (plan.batch, x.channels) if each else (x.channels,)
    plan.steps.instance_norm_plus(
        plan.array(x), plan.array(y), *(_parameter(row, *shape) for row in rows), plan.batch,
        x.channels, x.height * x.width, True, each, plan.bfloat16, plan.bfloat16, spec.elu,
        spec.eps, *_neighbours(plan, op),
    )  # fmt: skip


def _group_norm(plan: PlanMemory, op: Op) -> None:
    spec, x, y = op.spec, op.inputs[0], op.outputs[0]
    assert isinstance(spec, GroupNormSpec)
    tokens = op.kind == "layer_norm"  # each token is normalised by itself
    batch, plane = plan.batch, x.height * x.width
    batch, plane = (batch * plane, 1) if tokens else (batch, plane)
    gamma, beta = (
        NONE if p is None else _parameter(plan.float32(f"{op.name} {name}", p)[0], x.channels)
        for name, p in (("weight", spec.weight), ("bias", spec.bias))
    )
    more = [
        NONE if v is None else _rows(plan.vector(v, plus=plus))
        for v, plus in ((spec.add, 0.0), (spec.scale, -1.0), (spec.shift, 0.0))
    ]
    plan.steps.group_norm(
        plan.array(x), plan.target(y), gamma, beta, *more, batch, x.channels, plane, spec.groups,
        True, plan.bfloat16, plan.bfloat16, activation_code(spec.activation or "none"), spec.eps,
        *_neighbours(plan, op),
    )  # fmt: skip


def _neighbours(plan: PlanMemory, op: Op) -> tuple[Array, int, int]:
    """Returns the sums that a norm is given, the maps' width, and the border of its output."""
    sums = sums_among(op.inputs)
    return NONE if sums is None else plan.array(sums), op.inputs[0].width, border_of(op.outputs[0])


def _affine(plan: PlanMemory, op: Op) -> None:
    spec, x, y = op.spec, op.inputs[0], op.outputs[0]
    assert isinstance(spec, AffineSpec)
    if spec.number is not None:
        plan.steps.add_activation(
            plan.array(x), NONE, NONE, plan.array(y), *plan.pixels(x), plan.bfloat16, 0,
            spec.number, 1.0, plan.nhwc(x), border_of(y),
        )  # fmt: skip
        return
    scale, shift = (
        NONE if nothing else _rows(_factor(plan, f"{op.name} {name}", factor, x.channels))
        for name, factor, nothing in (
            ("scale", spec.scale, spec.only_shifts),
            ("shift", spec.shift, spec.only_scales),
        )
    )
    plan.steps.scale_shift(
        plan.array(x), plan.array(y), scale, shift, plan.batch, x.channels, x.height * x.width,
        True, plan.bfloat16, plan.bfloat16, activation_code(spec.activation or "none"),
    )  # fmt: skip


def _factor(plan: PlanMemory, key: str, factor: Factor, channels: int) -> Tensor:
    """Returns a factor as numbers (batch, channels)."""
    if isinstance(factor, Vector):
        return plan.vector(factor)
    (row,) = plan.float32(key, torch.as_tensor(factor, dtype=torch.float32))
    return plan.own(row.expand(plan.batch, channels).contiguous())


def _activation(plan: PlanMemory, op: Op) -> None:
    x, y = op.inputs[0], op.outputs[0]
    if isinstance(op.spec, ActivationSpec):
        plan.in_torch(op)
        return
    code = activation_code(op.kind)
    plan.steps.add_activation(
        plan.array(x), NONE, NONE, plan.target(y), *plan.pixels(x), plan.bfloat16, code, 1.0, 1.0,
        plan.nhwc(x), border_of(y),
    )  # fmt: skip


def _add(plan: PlanMemory, op: Op) -> None:
    """a + b, weighted perhaps; its activation, or both."""
    a, b = map(plan.array, op.inputs)
    activation = op.kind.partition("_")[2]
    weights = (op.spec.a, op.spec.b) if isinstance(op.spec, AddSpec) else (1.0, 1.0)
    x, first, last = op.inputs[0], op.outputs[0], op.outputs[-1]
    curved = bool(activation) or isinstance(last, PaddedMap)  # the sum itself has no border
    plan.steps.add_activation(
        a, b, NONE if curved and last is first else plan.target(first),
        plan.target(last) if curved else NONE, *plan.pixels(x), plan.bfloat16,
        activation_code(activation or "none"), *weights, plan.nhwc(x), border_of(last),
    )  # fmt: skip


def _resize(plan: PlanMemory, op: Op) -> None:
    x, y = op.inputs[0], op.outputs[0]
    added = plan.array(y) if op.kind == "resize_add" else NONE
    plan.steps.resize_add(
        plan.array(x), added, plan.array(y), plan.nhwc(x), y.height, y.width, plan.bfloat16
    )


def _nearest(plan: PlanMemory, op: Op) -> None:
    x, y = op.inputs[0], op.outputs[0]
    plan.steps.upsample_nearest(
        plan.array(x), plan.target(y), plan.nhwc(x), y.height // x.height, y.width // x.width,
        plan.bfloat16,
    )  # fmt: skip


def _mean_pool(plan: PlanMemory, op: Op) -> None:
    x, y = op.inputs[0], op.outputs[0]
    plan.steps.mean_pool2(plan.array(x), NONE, plan.array(y), plan.nhwc(x), plan.bfloat16)


def _pool5(plan: PlanMemory, op: Op) -> None:
    x, y = op.inputs[0], op.outputs[0]
    pool = {"max_pool5": plan.steps.max_pool5, "avg_pool5": plan.steps.avg_pool5}[op.kind]
    pool(plan.array(x), plan.array(y), plan.nhwc(x), plan.bfloat16, border_of(y))


def _concat(plan: PlanMemory, op: Op) -> None:
    """Copies of the maps that were not written where they belong."""
    y, first = op.outputs[0], 0
    for x in op.inputs:
        if x not in plan.graph.slices:
            plan.steps.copy_channels(
                plan.array(x), plan.array(y), *plan.pixels(x), x.channels, 0, y.channels, first,
                plan.bfloat16, plan.bfloat16,
            )  # fmt: skip
        first += x.channels


def _attention(plan: PlanMemory, op: Op) -> None:
    spec = op.spec
    assert isinstance(spec, AttentionSpec)
    q, k, v = spec.query, spec.key, spec.value
    heads, queries, width = q.shape
    across = v.shape[2]
    four = (q, k, v, torch_steps.attended(op))
    plan.steps.attention(
        *(plan.array(view.map, view.offset) for view in four),
        (plan.batch, heads, queries, k.shape[1], width, across),
        *((view.strides[1], view.strides[0]) for view in four), spec.scale, plan.bfloat16,
    )  # fmt: skip


def attention_by_products(plan: PlanMemory, op: Op) -> None:
    """Appends an attention as products in the maps' type, with the scores between them.

    The scores are rounded to the maps' type. In bfloat16 the products are several times as fast on
    processors that multiply it.
    """
    spec = op.spec
    assert isinstance(spec, AttentionSpec)
    q, k, v = map(plan.view, (spec.query, spec.key, spec.value))
    heads, queries, keys = *q.shape[1:3], v.shape[2]
    scores = plan.scratch(plan.batch, heads, queries, keys)
    onednn.products(plan.steps, op.name, q, k.transpose(2, 3), scores)
    memory = array("scores", scores, tuple(scores.shape), plan.dtype)
    plan.steps.softmax(memory, plan.batch * heads * queries, keys, spec.scale, plan.bfloat16)
    onednn.products(plan.steps, op.name, scores, v, plan.view(attended(op)))


def _product(plan: PlanMemory, op: Op) -> None:
    spec = op.spec
    assert isinstance(spec, ProductSpec)
    if plan.converts:
        plan.in_torch(op)
        return
    onednn.products(plan.steps, op.name, *map(plan.view, (spec.a, spec.b, spec.y)))


def _softmax(plan: PlanMemory, op: Op) -> None:
    spec, x, y = op.spec, op.inputs[0], op.outputs[0]
    assert isinstance(spec, SoftmaxSpec)
    if not op.overwrites:
        plan.copy(x, y)
    rows = plan.batch * spec.rows
    plan.steps.softmax(plan.array(y), rows, spec.columns, spec.scale, plan.bfloat16)


def _conv_transpose(plan: PlanMemory, op: Op) -> None:
    """A kernel of ours for those with a kernel for each channel."""
    spec = op.spec
    assert isinstance(spec, TransposedSpec)
    if not is_depthwise(spec):
        plan.in_torch(op)
        return
    x, y = op.inputs[0], op.outputs[0]
    biases = [] if spec.bias is None else [spec.bias]
    weight, *shift = plan.float32(op.name, spec.weight[:, 0].permute(1, 2, 0), *biases)
    plan.steps.depthwise_transposed(
        plan.array(x), _parameter(weight, *weight.shape),
        _parameter(shift[0], x.channels) if shift else NONE, plan.array(y), plan.nhwc(x), y.height,
        y.width, len(weight), spec.stride, spec.padding, plan.bfloat16,
    )  # fmt: skip


def _depth_to_space(plan: PlanMemory, op: Op) -> None:
    spec, z, y = op.spec, op.inputs[0], op.outputs[0]
    assert isinstance(spec, SquaresSpec)
    batch, height, width, _ = plan.nhwc(z)
    plan.steps.depth_to_space(
        plan.array(z), plan.target(y), (batch, height, width, y.channels), y.height, y.width,
        spec.factor, spec.first, plan.bfloat16,
    )  # fmt: skip


def _in_torch(plan: PlanMemory, op: Op) -> None:
    plan.in_torch(op)


# Operations whose kernel can write a map with gaps between its pixels. Convolutions by kernels of
# ours do, too.
_WRITES_PIXELS = ("group_norm", "layer_norm", "add", "nearest2", "depth_to_space")


def writes_pixels(op: Op) -> bool:
    """Whether the kernel of an operation that is no convolution can write a slice of a map."""
    plain = op.kind in ACTIVATIONS and op.spec is None
    return plain or op.kind in _WRITES_PIXELS or op.kind.startswith("add_")


TABLE: dict[str, Adder] = {
    "norm": _norm,
    "group_norm": _group_norm,
    "layer_norm": _group_norm,
    "affine": _affine,
    "activation": _activation,
    "add": _add,
    "resize": _resize,
    "resize_add": _resize,
    "nearest2": _nearest,
    "mean_pool2": _mean_pool,
    "max_pool5": _pool5,
    "avg_pool5": _pool5,
    "concat": _concat,
    "attention": _attention,
    "product": _product,
    "softmax": _softmax,
    "conv_transpose": _conv_transpose,
    "depth_to_space": _depth_to_space,
    "pad": _in_torch,
    "copy": _in_torch,
    "torch": _in_torch,
}


def _parameter(parameter: Tensor, *shape: int) -> Array:
    return array("parameters of a norm", parameter, shape, torch.float32)


def _rows(rows: Tensor) -> Array:
    return array("numbers of each image", rows, tuple(rows.shape), torch.float32)
