"""Steps of a plan that kernels of ours, or cuDNN's convolutions, run; the rest is PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ncsn_fast.engines.cuda.memory import PlanMemory
from ncsn_fast.engines.lowering.graph import (
    AffineSpec,
    ConvolutionSpec,
    GroupNormSpec,
    NormSpec,
    Op,
    PointwiseSpec,
    Vector,
)
from ncsn_fast.engines.lowering.torch_steps import Step


def kernel_step(plan: PlanMemory, op: Op) -> Step | None:
    """Returns the function that runs an operation; None if no kernel covers it."""
    make = TABLE.get(op.kind)
    return None if make is None else make(plan, op)


def _convolution(plan: PlanMemory, op: Op) -> Step | None:
    spec = op.spec
    assert isinstance(spec, ConvolutionSpec)
    if spec.groups > 1:  # PyTorch chooses between cuDNN's kernels and its own depthwise ones
        return None
    x, y = plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    weight = plan.convolution_weight(op, spec)
    return functools.partial(plan.kernels.convolution, x, weight, spec, y)


def _norm(plan: PlanMemory, op: Op) -> Step:
    spec, x, y = op.spec, plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    assert isinstance(spec, NormSpec)
    if spec.by_level:
        gamma, alpha, beta = plan.level_rows(op)
    else:
        rows = [plan.vector(v) for v in spec.vectors] or plan.float32(op.name, *spec.parameters)
        alpha, gamma, beta = rows
    return functools.partial(
        plan.kernels.instance_norm_plus, x, alpha, gamma, beta, elu=spec.elu, eps=spec.eps,
        bias=plan.bias(op, spec.bias), out=y, partials=plan.workspace(x)[0],
    )  # fmt: skip


def _group_norm(plan: PlanMemory, op: Op) -> Step:
    spec, x, y = op.spec, plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    assert isinstance(spec, GroupNormSpec)
    gamma, beta = (
        None if p is None else plan.float32(f"{op.name} {name}", p)[0]
        for name, p in (("weight", spec.weight), ("bias", spec.bias))
    )
    bias, add = plan.bias(op, spec.biases), None
    if spec.add is not None:
        add = plan.vector(spec.add, plus=0.0 if bias is None else bias)
    elif bias is not None:
        add = plan.own(bias.expand(plan.batch, -1).contiguous())
    scale = None if spec.scale is None else plan.vector(spec.scale, plus=-1.0)
    shift = None if spec.shift is None else plan.vector(spec.shift)
    return functools.partial(
        plan.kernels.group_norm, x, spec.groups, gamma, beta, add=add, scale=scale, shift=shift,
        activation=spec.activation or "none", eps=spec.eps, out=y, workspace=plan.workspace(x),
    )  # fmt: skip


def _affine(plan: PlanMemory, op: Op) -> Step:
    spec, x, y = op.spec, plan.tensor(op.inputs[0]), plan.tensor(op.outputs[0])
    assert isinstance(spec, AffineSpec)
    rows = plan.new_rows(3, x.shape[1])
    mean, scale, shift = rows.unbind(1)
    if (bias := plan.bias(op, spec.biases)) is not None:
        mean.copy_(-bias)
    for name, factor, row in (("scale", spec.scale, scale), ("shift", spec.shift, shift)):
        if isinstance(factor, Vector):
            plan.vector(factor, into=row)
        else:
            numbers = torch.as_tensor(factor, dtype=torch.float32)
            row.copy_(plan.float32(f"{op.name} {name}", numbers)[0])
    return functools.partial(plan.kernels.scale_shift, x, rows, spec.activation or "none", out=y)


def _pointwise(plan: PlanMemory, op: Op) -> Step:
    spec, inputs = op.spec, [*map(plan.tensor, op.inputs)]
    outputs = [*map(plan.tensor, op.outputs)]
    assert isinstance(spec, PointwiseSpec)
    total: Tensor | None = outputs[0] if spec.total else None
    y: Tensor | None = outputs[-1] if spec.activation else None
    return functools.partial(
        plan.kernels.pointwise, inputs, plan.bias(op, spec.bias), total, y,
        spec.activation or "none", spec.weights,
    )  # fmt: skip


def _resize(plan: PlanMemory, op: Op) -> Step:
    x, *added = map(plan.tensor, op.inputs)
    y = plan.tensor(op.outputs[0])
    size = (y.shape[2], y.shape[3])
    return functools.partial(plan.kernels.resize_add, x, size, *added, out=y)


def _pool(plan: PlanMemory, op: Op) -> Step:
    kernel = {
        "max_pool5": plan.kernels.max_pool5,
        "avg_pool5": plan.kernels.avg_pool5,
        "mean_pool2": plan.kernels.mean_pool2,
    }[op.kind]
    return functools.partial(kernel, plan.tensor(op.inputs[0]), out=plan.tensor(op.outputs[0]))


TABLE: dict[str, Callable[[PlanMemory, Op], Step | None]] = {
    "conv": _convolution,
    "norm": _norm,
    "group_norm": _group_norm,
    "affine": _affine,
    "pointwise": _pointwise,
    "resize": _resize,
    "resize_add": _resize,
    "max_pool5": _pool,
    "avg_pool5": _pool,
    "mean_pool2": _pool,
}
