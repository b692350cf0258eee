"""Gradients of the fused ops: rules of autograd, and the ops that these call.

Of each op X: `X_setup` and `X_backward` are its rule, `X_gradients` is the op of its gradients, and
`X_gradients_fake` their shapes. Gradients that are differentiated again, float64 and the reference
backend take the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncsn_fast.ops import checks, cuda, gradients, reference
from ncsn_fast.ops.activations import ACTIVATIONS
from ncsn_fast.ops.backends import backend_name, has_triton
from ncsn_fast.ops.checks import CUDA_DTYPES, KERNEL_DTYPES, memory_format


def has_cpu_gradients(x: Tensor) -> bool:
    """Returns whether the CPU has kernels for gradients at x, and may use them."""
    return (
        x.is_cpu
        and not checks.on_gpu(x)
        and x.dtype in KERNEL_DTYPES
        and x.ndim == 4
        and backend_name.get() != "reference"
    )


def norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `norm_backward` needs."""
    *tensors, ctx.elu, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    x = tensors[0]
    # Decided here: backward runs in threads that do not see context variables.
    ctx.fused = has_cpu_gradients(x) or (
        checks.on_gpu(x)
        and x.dtype in CUDA_DTYPES
        and backend_name.get() != "reference"
        and has_triton("gradients")
    )


def norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `instance_norm_plus`, with None for its options."""
    if ctx.fused and not torch.is_grad_enabled():
        op = torch.ops.ncsn_fast.instance_norm_plus_backward.default
        return (*op(grad, *ctx.saved_tensors, ctx.elu, ctx.eps), None, None)
    found = reference.instance_norm_plus_backward(
        grad, *ctx.saved_tensors, elu=ctx.elu, eps=ctx.eps
    )
    return (*found, None, None)


def norm_gradients(
    grad: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float
) -> tuple[Tensor, ...]:
    """Runs the op of the gradients of `instance_norm_plus`."""
    if checks.on_gpu(x) and x.dtype in CUDA_DTYPES:
        return cuda.instance_norm_plus_backward(grad, x, alpha, gamma, beta, elu, eps)
    if has_cpu_gradients(x):
        return gradients.instance_norm_plus(grad, x, alpha, gamma, beta, elu=elu, eps=eps)
    first, *rest = reference.instance_norm_plus_backward(
        grad, x, alpha, gamma, beta, elu=elu, eps=eps
    )
    return first.contiguous(memory_format=memory_format(x)), *rest


def norm_gradients_fake(
    grad: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, elu: bool, eps: float
) -> tuple[Tensor, ...]:
    """Returns tensors of the shapes of `norm_gradients`."""
    like_x = torch.empty_like(x, memory_format=memory_format(x))
    return like_x, *(p.new_empty(p.shape) for p in (alpha, gamma, beta))


def group_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `group_norm_backward` needs."""
    x, ctx.groups, *parameters, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(x, *parameters)
    ctx.fused = has_cpu_gradients(x)


def group_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `group_norm`, with None for what has none."""
    x, *parameters = ctx.saved_tensors
    if ctx.fused and not torch.is_grad_enabled():
        op = torch.ops.ncsn_fast.group_norm_backward.default
        first, *given = op(grad, x, ctx.groups, *parameters, ctx.activation, ctx.eps)
        left = iter(given)
        rest = [None if p is None else next(left) for p in parameters]
    else:
        first, *rest = _group_norm_reference_gradients(
            grad, x, ctx.groups, *parameters, ctx.activation, ctx.eps
        )
    return first, None, *rest, None, None


def _group_norm_reference_gradients(
    grad: Tensor, x: Tensor, groups: int, *arguments: Any
) -> tuple[Tensor | None, ...]:
    gamma, beta, add, scale, shift, activation, eps = arguments
    return reference.group_norm_backward(
        grad, x, groups, gamma, beta, add=add, scale=scale, shift=shift, activation=activation,
        eps=eps,
    )  # fmt: skip


def group_norm_gradients(grad: Tensor, x: Tensor, groups: int, *arguments: Any) -> list[Tensor]:
    """Returns the gradients of x, and of those parameters that there are."""
    *parameters, activation, eps = arguments
    if has_cpu_gradients(x):
        found = gradients.group_norm(grad, x, groups, *parameters, activation=activation, eps=eps)
    else:
        found = _group_norm_reference_gradients(grad, x, groups, *arguments)
    first, *rest = (g for g in found if g is not None)
    return [first.contiguous(memory_format=memory_format(x)), *rest]


def group_norm_gradients_fake(
    grad: Tensor, x: Tensor, groups: int, *arguments: Any
) -> list[Tensor]:
    """Returns tensors of the shapes of `group_norm_gradients`."""
    like_x = torch.empty_like(x, memory_format=memory_format(x))
    return [like_x, *(p.new_empty(p.shape) for p in arguments[:5] if p is not None)]


def activation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `activation_backward` needs."""
    x, ctx.name = inputs
    ctx.save_for_backward(x)
    ctx.fused = has_cpu_gradients(x)


def activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Returns the gradient of `activation`, and None for its name."""
    (x,) = ctx.saved_tensors
    if ctx.fused and not torch.is_grad_enabled():
        return torch.ops.ncsn_fast.activation_backward.default(grad, x, ctx.name), None
    return ACTIVATIONS[ctx.name].backward(grad, x), None


def activation_gradients(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """Runs the op of the gradient of `activation`."""
    if has_cpu_gradients(x):
        return gradients.activation(grad, x, name)
    return ACTIVATIONS[name].backward(grad, x).contiguous(memory_format=memory_format(x))


def activation_gradients_fake(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """Returns a tensor of the shape of `activation_gradients`."""
    return torch.empty_like(x, memory_format=memory_format(x))
