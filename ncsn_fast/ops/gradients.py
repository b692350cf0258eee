"""Gradients of norms and activations on the CPU.

Passes over the maps are the kernels of csrc/cpu/norm_gradients.cpp; what they leave, one number for
each sample and channel, is PyTorch in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ncsn_fast.ops import extension, reference
from ncsn_fast.ops.checks import is_dense, memory_format
from ncsn_fast.ops.extension import forced_isa


class Affine(NamedTuple):
    """z = (x - mean) scale + shift, with (N, C) float64 each."""

    mean: Tensor
    scale: Tensor
    shift: Tensor


# Maps the sums over the plane of g and of g (x - mean), (N, C) float64, to the slope and the offset
# of what the statistics add to the gradient, (x - mean) slope + offset, and to the gradients of the
# parameters, (N, C) each.
Through = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, list[Tensor]]]


def _gradients(
    grad: Tensor, x: Tensor, z: Affine, activation: str, through: Through
) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradients of activation(z) for x and for the parameters of a norm of x."""
    isa, (n, c) = forced_isa.get(), x.shape[:2]
    grad = grad.to(x.dtype).contiguous(memory_format=memory_format(x))
    rows, sums = torch.empty(n, 5, c), torch.empty(n, 2, c, dtype=torch.float64)
    rest = z.mean - z.mean.float()  # of rounding to the kernel's float32
    rows[:, 0], rows[:, 1], rows[:, 2] = z.mean, z.scale, z.shift - rest * z.scale
    extension.norm_gradient(x, grad, rows, activation, sums=sums, isa=isa)
    total = sums[:, 0]
    slope, offset, parameters = through(total, sums[:, 1] - rest * total)
    rows[:, 3], rows[:, 4] = slope, offset - rest * slope
    out = torch.empty_like(x)
    extension.norm_gradient(x, grad, rows, activation, out=out, isa=isa)
    return out, parameters


def instance_norm_plus(
    grad: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, *, elu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `reference.instance_norm_plus_backward`; x is float32 or bfloat16, on the CPU."""
    x = x if is_dense(x) else x.contiguous()
    mean, variance = extension.channel_moments(x, forced_isa.get()).unbind(1)
    rstd = torch.rsqrt(variance + eps)
    deviation = mean - mean.mean(dim=1, keepdim=True)
    mean_hat, rstd_channels = reference.standardised_means(deviation, eps)
    a, g, b = (p.double() if p.ndim == 2 else p.double()[None] for p in (alpha, gamma, beta))
    scale, size = g * rstd, x.shape[2] * x.shape[3]

    def through(total: Tensor, along: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        grad_dot = along * rstd
        grad_mean = reference.standardised_means_backward(g * a * total, mean_hat, rstd_channels)
        slope, offset = -scale * rstd * grad_dot / size, (grad_mean - scale * total) / size
        return slope, offset, [g * mean_hat * total, grad_dot + a * mean_hat * total, total]

    z = Affine(mean, scale, g * a * mean_hat + b)
    grad_x, grads = _gradients(grad, x, z, "elu" if elu else "none", through)
    of_alpha, of_gamma, of_beta = map(reference.summed_like, grads, (alpha, gamma, beta))
    return grad_x, of_alpha, of_gamma, of_beta


def group_norm(
    grad: Tensor,
    x: Tensor,
    groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    activation: str,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Computes `reference.group_norm_backward`; x is float32 or bfloat16, on the CPU."""
    x = x if is_dense(x) else x.contiguous()
    (n, c), plane = x.shape[:2], x.shape[2] * x.shape[3]
    means, variances = extension.channel_moments(x, forced_isa.get()).unbind(1)

    def of_group(values: Tensor) -> Tensor:
        grouped = values.view(n, groups, c // groups).mean(dim=2, keepdim=True)
        return grouped.expand(n, groups, c // groups).reshape(n, c)

    def row(parameter: Tensor | None, otherwise: float) -> Tensor:
        if parameter is None:
            return means.new_full((1, 1), otherwise)
        return parameter.double().view(-1, c)

    added = row(add, 0.0)
    centre = of_group(means + added)
    away = means + added - centre
    rstd = torch.rsqrt(of_group(variances + away.square()) + eps)
    slope, modulation = row(gamma, 1.0), 1 + row(scale, 0.0)
    factor = slope * modulation * rstd

    def through(total: Tensor, along: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        bend = -rstd * of_group(factor * along) / plane * rstd
        offset = -of_group(factor * total) / plane
        along = along * rstd
        of_scale = slope * along + row(beta, 0.0) * total
        of_add = factor * total + plane * (offset + bend * away)
        return bend, offset, [modulation * along, modulation * total, of_add, of_scale, total]

    z = Affine(centre - added, factor.expand(n, c), row(beta, 0.0) * modulation + row(shift, 0.0))
    grad_x, grads = _gradients(grad, x, z, activation, through)
    parameters = zip(grads, (gamma, beta, add, scale, shift), strict=True)
    return grad_x, *(None if p is None else reference.summed_like(g, p) for g, p in parameters)


def activation(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """Returns grad times an activation's derivative at x, (N, C, H, W) float32 or bfloat16."""
    x = x if is_dense(x) else x.contiguous()
    grad, out = grad.contiguous(memory_format=memory_format(x)), torch.empty_like(x)
    extension.norm_gradient(x, grad, None, name, out=out, isa=forced_isa.get())
    return out
