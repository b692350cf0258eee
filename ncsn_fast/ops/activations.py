"""Activations of the fused ops: their names, and their numbers in C++ (ncsn_fast/activation.h)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """A row of the table: the number of the enum in C++, and the function in PyTorch."""

    code: int
    function: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "none": Activation(0, lambda x: x),
    "elu": Activation(1, F.elu),
    "relu": Activation(2, F.relu),
    "silu": Activation(3, F.silu),
    "sigmoid": Activation(4, torch.sigmoid),
    "tanh": Activation(5, torch.tanh),
    "gelu": Activation(6, F.gelu),
    "gelu_tanh": Activation(7, functools.partial(F.gelu, approximate="tanh")),
}


def check_activation(name: str) -> None:
    """Raises ValueError, naming the activations there are, unless this is one of them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")


def activation_code(name: str) -> int:
    """Returns the number of an activation in C++."""
    check_activation(name)
    return ACTIVATIONS[name].code
