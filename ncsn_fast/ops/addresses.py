"""Tensors as the extension takes them: an address and a number of bytes, checked.

No other module takes an address for C++; tests/test_structure.py holds that. A kernel knows only
what it is told, so shape, dtype, device and layout are checked here, and the extension holds the
bytes against the sizes of every call (csrc/array.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

Array = tuple[int, int]  # address, bytes
PixelRows = tuple[int, int, int]  # and elements from a pixel of a map to the next, with gaps
NONE: Array = (0, 0)  # no tensor
DENSE = -1  # border of a map that has none around it (ops/tiles.py)
CPU = torch.device("cpu")
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def check(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    layout: torch.memory_format = NCHW,
) -> None:
    """Raises unless a tensor is what the caller says; looks at no values, so no GPU is awaited.

    Raises:
        TypeError: it is no tensor, or has another dtype.
        ValueError: it has another shape, device or layout, or its storage has been freed.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}; got {x.dtype}. Convert it with .to({dtype}).")
    if x.device != device and (x.device.type != device.type or device.index is not None):
        raise ValueError(f"{name} must be on {device}; it is on {x.device}")
    if not x.is_contiguous(memory_format=layout) and x.numel():
        kind = "contiguous" if layout is NCHW else "channels-last"
        call = ".contiguous()" if layout is NCHW else f".contiguous(memory_format={layout})"
        raise ValueError(f"{name} must be {kind}; got strides {x.stride()}. Use {name}{call}.")
    _address(name, x)


def array(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    layout: torch.memory_format = NCHW,
) -> Array:
    """The memory of a tensor that is what the caller says, as `check` has it; NONE for None."""
    if x is None:
        return NONE
    # As `check`, in one go: kernels of some microseconds have five of these.
    if not (
        isinstance(x, Tensor)
        and x.shape == shape
        and x.dtype is dtype
        and x.device == device
        and (x.is_contiguous() if layout is NCHW else x.is_contiguous(memory_format=layout))
    ):
        check(name, x, shape, dtype, device=device, layout=layout)
    return _address(name, x), x.nbytes


def dense(name: str, x: Tensor, dtype: torch.dtype, *, device: torch.device = CPU) -> Array:
    """As `array`, of a tensor of any shape that is contiguous or channels-last."""
    layout = NCHW if x.ndim != 4 or x.is_contiguous() else NHWC
    return array(name, x, tuple(x.shape), dtype, device=device, layout=layout)


def strided(name: str, x: Tensor) -> Array:
    """From the first element of a view to the end of its storage, which its strides may reach."""
    first = int(x.storage_offset()) * x.element_size()
    return _address(name, x), x.untyped_storage().nbytes() - first


def part(memory: Tensor, offset: int, size: int) -> Array:
    """`size` bytes of a contiguous tensor of bytes on the CPU, from `offset`."""
    address, total = array("memory", memory, tuple(memory.shape), torch.uint8)
    if not 0 <= offset <= offset + size <= total:
        raise ValueError(f"{total} bytes of memory have no part of {size} at {offset}")
    return address + offset, size


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether there is memory between the first and the last element of both tensors."""
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + _extent(b) and other < start + _extent(a)


def _extent(x: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (1 + steps) * x.element_size() if x.numel() else 0


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether tensors begin at the same address."""
    return a.data_ptr() == b.data_ptr()


def misalignment(x: Tensor, multiple: int) -> int:
    """Bytes by which a tensor begins behind a multiple of so many."""
    return x.data_ptr() % multiple


def _address(name: str, x: Tensor) -> int:
    """A tensor's address, 0 of an empty one; ValueError if its storage has been freed."""
    address = x.data_ptr()
    if address == 0 and x.numel():
        raise ValueError(f"{name} must have memory; its storage has been freed")
    return address
