"""Launcher helpers: argument checks and kernel starts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "elu", "relu", "silu", "sigmoid", "tanh", "gelu", "gelu_tanh")
LINE = 128  # bytes per cache line; a warp reads whole lines


def power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up."""
    return -(-a // b)


def start(
    kernel: Any, programs: int, device: torch.device, *args: Any, warps: int, **meta: Any
) -> None:
    """Launches `programs` programs on the device's current stream; nothing for an empty grid.

    Disables contraction of multiply-adds, so that results have the bits that the source specifies.
    """
    if programs == 0:
        return
    guard: AbstractContextManager[Any] = (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    )
    with guard:
        kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=False, **meta)


def check_activation(name: str) -> None:
    """Raises ValueError, naming the activations there are, unless this is one of them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")


def check_bias(bias: Tensor | None, x: Tensor) -> None:
    """Raises unless bias is None or a valid bias for the channels of x."""
    if bias is None:
        return
    shape = (x.shape[1],)
    if bias.shape != shape or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(
            f"bias must be float32, contiguous, of shape {shape}; got {bias.dtype}, "
            f"{tuple(bias.shape)} with strides {bias.stride()}"
        )
    if bias.device != x.device:
        raise ValueError(f"bias must be on {x.device} like the map; it is on {bias.device}")


def check_maps(shape: tuple[int, ...] | None = None, /, **maps: Tensor | None) -> None:
    """Raises unless the maps are channels-last, of this shape, of a kernel's dtype, on one device.

    Maps that are None are skipped; without a shape, that of the first map counts.
    """
    given = {name: x for name, x in maps.items() if x is not None}
    first = next(iter(given.values()))
    shape = tuple(first.shape) if shape is None else shape
    for name, x in given.items():
        if len(shape) != 4 or tuple(x.shape) != shape:
            expected = shape if len(shape) == 4 else "(N, C, H, W)"
            raise ValueError(f"{name} must have shape {expected}; got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16; got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on {first.device}; it is on {x.device}")
        if x.numel() and not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name} must be channels-last; got shape {tuple(x.shape)} with strides "
                f"{x.stride()}. Use {name}.contiguous(memory_format=torch.channels_last)."
            )
