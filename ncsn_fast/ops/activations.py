"""Activations of the fused ops: their names, and their numbers in C++ (ncsn_fast/activation.h)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """A row of the table: the number of the enum in C++, the function and its derivative."""

    code: int
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    twice = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(twice * (x + 0.044715 * x**3))
    return s * (1 + x * (1 - s) * twice * (1 + 3 * 0.044715 * x * x))


ACTIVATIONS = {
    "none": Activation(0, lambda x: x, torch.ones_like),
    "elu": Activation(1, F.elu, lambda x: torch.exp(x.clamp(max=0))),
    "relu": Activation(2, F.relu, lambda x: (x > 0).to(x.dtype)),
    "silu": Activation(3, F.silu, _silu_derivative),
    "sigmoid": Activation(4, torch.sigmoid, _sigmoid_derivative),
    "tanh": Activation(5, torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "gelu": Activation(6, F.gelu, _gelu_derivative),
    "gelu_tanh": Activation(
        7, functools.partial(F.gelu, approximate="tanh"), _gelu_tanh_derivative
    ),
}


def check_activation(name: str) -> None:
    """Raises ValueError, naming the activations there are, unless this is one of them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")


def activation_code(name: str) -> int:
    """Returns the number of an activation in C++."""
    check_activation(name)
    return ACTIVATIONS[name].code
