"""Checks of the maps that kernels of the CPU take, and their memory as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncsn_fast.ops.addresses import NHWC, NONE, Array, array, is_same_memory, overlap
from ncsn_fast.ops.checks import KERNEL_DTYPES


def map_of(name: str, x: Tensor | None) -> Array:
    """Returns the memory of a channels-last map; NONE for no map."""
    return NONE if x is None else array(name, x, tuple(x.shape), x.dtype, layout=NHWC)


def is_bfloat16(x: Tensor) -> bool:
    """Whether a tensor is bfloat16."""
    return x.dtype is torch.bfloat16


def nhwc(x: Tensor) -> tuple[int, int, int, int]:
    """Returns the sizes of a map: batch, height, width, channels."""
    n, c, height, width = x.shape
    return n, height, width, c


def check_types(dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
    """Raises unless all tensors are on the CPU and of this dtype, one of the kernels'."""
    for name, tensor in tensors.items():
        if tensor.dtype is not dtype or dtype not in KERNEL_DTYPES:
            dtypes = ", ".join(f"{k} {t.dtype}" for k, t in tensors.items())
            raise TypeError(f"all must be float32, or all bfloat16 ({dtype} here); got {dtypes}")
        if not tensor.is_cpu:
            raise ValueError(f"this kernel runs on the CPU; {name} is on {tensor.device}")


def check_flat(**tensors: Tensor) -> None:
    """Raises unless the tensors share one shape, one dtype and one dense layout."""
    first = next(iter(tensors.values()))
    check_types(first.dtype, tensors)
    if any(t.shape != first.shape for t in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"all must have one shape; got {shapes}")
    formats = (torch.contiguous_format, torch.channels_last)[: 2 if first.ndim == 4 else 1]
    if not any(all(t.is_contiguous(memory_format=f) for t in tensors.values()) for f in formats):
        strides = ", ".join(f"{name} {t.stride()}" for name, t in tensors.items())
        raise ValueError(f"all must be contiguous, or all channels-last; got strides {strides}")


def check_maps(
    shape: Sequence[int], dtype: torch.dtype | None = None, /, **tensors: Tensor
) -> None:
    """Raises unless the tensors are channels-last, of this shape and of one dtype."""
    check_types(dtype or next(iter(tensors.values())).dtype, tensors)
    for name, tensor in tensors.items():
        if tensor.shape != shape or len(shape) != 4:
            expected = tuple(shape) if len(shape) == 4 else "(N, C, H, W)"
            raise ValueError(f"{name} must have shape {expected}; got {tuple(tensor.shape)}")
        if tensor.numel() and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name} must be channels-last; got shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}. Use {name}.contiguous(memory_format=torch.channels_last)."
            )


def check_outputs(
    inputs: dict[str, Tensor], outputs: dict[str, Tensor], *, in_place: bool = False
) -> None:
    """Raises if an output overlaps an input (in place: unless it is exactly that input)."""
    rest = list(outputs.items())
    for i, (name, output) in enumerate(rest):
        for other, tensor in (*inputs.items(), *rest[:i]):
            allowed = in_place and other in inputs and is_same_memory(output, tensor)
            if not allowed and overlap(output, tensor):
                may = f"be {other} or lie apart from it" if in_place else f"lie apart from {other}"
                raise ValueError(
                    f"{name} of shape {tuple(output.shape)} must {may} of shape "
                    f"{tuple(tensor.shape)}; their memory overlaps"
                )
