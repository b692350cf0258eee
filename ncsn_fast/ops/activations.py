"""Activations of the fused ops: their names, and their numbers in C++ (ncsn_fast/activation.h)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """A row of the table: the number of the enum in C++, the function and its gradient.

    `backward` maps (grad, x) to grad times the derivative at x, in one pass of PyTorch, and is
    itself differentiable.
    """

    code: int
    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten


def _gelu(approximate: str) -> dict[str, Callable[..., Tensor]]:
    return {
        "function": functools.partial(F.gelu, approximate=approximate),
        "backward": functools.partial(_aten.gelu_backward, approximate=approximate),
    }


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(grad, x)  # which has no derivative
    s = torch.sigmoid(x)
    return grad * (s * (1 + x * (1 - s)))


ACTIVATIONS = {
    "none": Activation(0, lambda x: x, lambda grad, x: grad),
    "elu": Activation(1, F.elu, lambda grad, x: _aten.elu_backward(grad, 1, 1, 1, False, x)),
    "relu": Activation(2, F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "silu": Activation(3, F.silu, _silu_backward),
    "sigmoid": Activation(
        4, torch.sigmoid, lambda grad, x: _aten.sigmoid_backward(grad, torch.sigmoid(x))
    ),
    "tanh": Activation(5, torch.tanh, lambda grad, x: _aten.tanh_backward(grad, torch.tanh(x))),
    "gelu": Activation(6, **_gelu("none")),
    "gelu_tanh": Activation(7, **_gelu("tanh")),
}


def check_activation(name: str) -> None:
    """Raises ValueError, naming the activations there are, unless this is one of them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")


def activation_code(name: str) -> int:
    """Returns the number of an activation in C++."""
    check_activation(name)
    return ACTIVATIONS[name].code
