"""ELU (alpha 1) of a map, or of the sum of two, with or without the sum.

    s = a + b,   y = elu(s)

Maps have one layout, so they are flat here. The sum is float32 and y is made from it before it is
rounded. Bytes an element in bfloat16: 4 (ELU alone) to 8 (both outputs). Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.maths import elu as elu_of
from torch import Tensor

BLOCK, WARPS = 2048, 8


@triton.jit
def add_elu_kernel(a_ptr, b_ptr, total_ptr, y_ptr, count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        total += tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)
    if y_ptr is not None:
        y = elu_of(total, y_ptr.dtype.element_ty != tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def _check(**tensors: Tensor | None) -> None:
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given.values()))
    formats = (torch.contiguous_format, torch.channels_last)[: 2 if first.ndim == 4 else 1]
    if any(t.shape != first.shape or t.device != first.device for t in given.values()):
        found = ", ".join(f"{name} {tuple(t.shape)} on {t.device}" for name, t in given.items())
        raise ValueError(f"all must have one shape and be on one device; got {found}")
    if any(t.dtype not in launch.DTYPES for t in given.values()):
        found = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"all must be float32, bfloat16 or float16; got {found}")
    if not any(all(t.is_contiguous(memory_format=f) for t in given.values()) for f in formats):
        found = ", ".join(f"{name} {t.stride()}" for name, t in given.items())
        raise ValueError(f"all must be contiguous, or all channels-last; got strides {found}")


def _start(a: Tensor, b: Tensor | None, total: Tensor | None, out: Tensor | None) -> None:
    _check(a=a, b=b, total=total, out=out)
    programs = launch.cdiv(a.numel(), BLOCK)
    launch.start(
        add_elu_kernel, programs, a.device, a, b, total, out, a.numel(), BLOCK=BLOCK, warps=WARPS
    )


def elu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`reference.elu`; out may be x."""
    out = torch.empty_like(x) if out is None else out
    _start(x, None, None, out)
    return out


def add(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a + b, computed in float32; out may be a or b."""
    out = torch.empty_like(a) if out is None else out
    _start(a, b, out, None)
    return out


def add_elu(
    a: Tensor, b: Tensor, *, total: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.add_elu`: (total, out); each may be a or b. `add` writes the sum alone."""
    total = torch.empty_like(a) if total is None else total
    out = torch.empty_like(a) if out is None else out
    _start(a, b, total, out)
    return total, out
