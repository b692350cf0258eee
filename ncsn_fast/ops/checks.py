"""Argument checks of the fused ops.

Every error names the expected value, the value received and the remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.utils._python_dispatch
from torch import Tensor
from torch.autograd import forward_ad

from ncsn_fast.ops.activations import check_activation

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (*KERNEL_DTYPES, torch.float16)


# Private to torch. Where a name is gone, its question is answered with yes: ops are slower then.
def _yes() -> bool:
    return True


_in_dispatch_mode = getattr(torch.utils._python_dispatch, "is_in_torch_dispatch_mode", _yes)
_interpreter = getattr(torch._C._functorch, "peek_interpreter_stack", _yes)
if _interpreter is _yes:
    logging.getLogger("ncsn_fast").warning(
        "torch %s hides whether torch.func transforms a call: IN++ runs in plain PyTorch",
        torch.__version__,
    )


class UpdateArguments(NamedTuple):
    """Arguments of `sampler_update_`, in the order of its schema."""

    x: Tensor
    f: Tensor
    h: Tensor | None
    coefficients: Sequence[float]
    seed: int
    samples: Tensor
    step: int
    noise_weights: Tensor | None
    mask: Tensor | None
    known: Tensor | None
    c_ref: float
    ref_step: int
    net_input: Tensor | None
    scale: float
    shift: float
    nonfinite: Tensor | None

    def row(self) -> list[float]:
        """The row's numbers in the order that kernels read them (kernels/rows.py)."""
        return [*padded(self.coefficients), self.c_ref, self.scale, self.shift]


def padded(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Returns (a, b, g, c, p, q, e, r); e and r are 0 where only six are given."""
    return (*coefficients, *(0.0, 0.0)[: 8 - len(coefficients)])


def on_gpu(x: Tensor) -> bool:
    """Returns whether x's ops run on the CUDA backend.

    Tests override it to send CPU tensors to kernels that run under Triton's interpreter.
    """
    return x.is_cuda


def is_dense(x: Tensor) -> bool:
    """Returns whether x is contiguous or channels-last."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns channels_last if x has that format and is not also contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _expect(name: str, x: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        supported = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {supported}; got {x.dtype}. Convert it with .to(dtype).")


def _expect_device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like x; it is on {tensor.device}")


def check_norm(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> None:
    """Raises ValueError or TypeError unless `instance_norm_plus` accepts these arguments."""
    shape, device = x.shape, x.device
    if len(shape) != 4:
        raise ValueError(f"x must have shape (N, C, H, W); got {tuple(shape)}")
    if x.dtype not in (*(CUDA_DTYPES if on_gpu(x) else KERNEL_DTYPES), torch.float64):
        raise TypeError(
            f"x must be float32, bfloat16 or float64; got {x.dtype}. Convert it with .to(dtype). "
            "float16 runs on CUDA devices only."
        )
    row, rows = (shape[1],), (shape[0], shape[1])
    for parameter in (alpha, gamma, beta):
        if parameter.shape != row and parameter.shape != rows:
            raise ValueError(
                f"alpha, gamma and beta must have shape {row} or {rows} for x of shape "
                f"{tuple(shape)}; got {[tuple(p.shape) for p in (alpha, gamma, beta)]}"
            )
        if parameter.device != device:
            devices = [str(p.device) for p in (alpha, gamma, beta)]
            raise ValueError(f"alpha, gamma and beta must be on {device} like x; are on {devices}")


def check_norm_out(x: Tensor, out: Tensor) -> None:
    """Raises ValueError or TypeError unless the kernel can write `out` from `x`."""
    _expect("out", out, x.shape, KERNEL_DTYPES)
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"x must be float32 or bfloat16; got {x.dtype}")
    if not x.is_cpu:
        raise ValueError(f"this kernel runs on the CPU; x is on {x.device}")
    if not _same_layout(x, out) or out.device != x.device:
        raise ValueError(
            "x and out must be on one device, both contiguous or both channels-last; got strides "
            f"{x.stride()} on {x.device} and {out.stride()} on {out.device}"
        )


def check_group_norm(
    x: Tensor,
    groups: int,
    parameters: dict[str, Tensor | None],
    rows: dict[str, Tensor | None],
    activation: str,
) -> None:
    """Raises ValueError or TypeError unless `group_norm` accepts these arguments.

    Args:
        parameters, rows: those that are (C,), and those that are (N, C).
    """
    check_activation(activation)
    if x.ndim != 4:
        raise ValueError(f"x must have shape (N, C, H, W); got {tuple(x.shape)}")
    if x.dtype not in (*(CUDA_DTYPES if on_gpu(x) else KERNEL_DTYPES), torch.float64):
        raise TypeError(
            f"x must be float32, bfloat16 or float64; got {x.dtype}. Convert it with .to(dtype). "
            "float16 runs on CUDA devices only."
        )
    n, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise ValueError(f"groups must divide the {c} channels of x; got {groups}")
    for shape, named in (((c,), parameters), ((n, c), rows)):
        for name, tensor in named.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape} for x of shape {tuple(x.shape)}; got "
                    f"{tuple(tensor.shape)}"
                )
        _expect_device(x, **named)


def _same_layout(x: Tensor, out: Tensor) -> bool:
    """Returns whether both tensors are contiguous or both are channels-last.

    A map with one channel or one pixel can be both at once.
    """
    formats = (torch.contiguous_format, torch.channels_last)
    return any(all(t.is_contiguous(memory_format=f) for t in (x, out)) for f in formats)


def check_update(u: UpdateArguments) -> None:
    """Raises ValueError or TypeError unless `sampler_update_` accepts these arguments."""
    x, f, h = u.x, u.f, u.h
    if x.ndim != 4 or not x.is_contiguous():
        raise ValueError(
            f"x must be a contiguous (B, C, H, W) tensor, as it is updated in place; got shape "
            f"{tuple(x.shape)} with strides {x.stride()}. Use x.contiguous()."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the state x must be float32 (or float64); got {x.dtype}")
    if len(u.coefficients) not in (6, 8):
        raise ValueError(
            "coefficients must be (a, b, g, c, p, q), with or without (e, r); got "
            f"{len(u.coefficients)} numbers"
        )
    if f.shape != x.shape or not f.dtype.is_floating_point:
        raise ValueError(
            f"f must be floating point of shape {tuple(x.shape)}; got {tuple(f.shape)}, {f.dtype}"
        )
    _expect("samples", u.samples, x.shape[:1], (torch.int64,))
    _expect_device(x, f=f, h=h, samples=u.samples)
    if h is not None:
        _expect("h", h, x.shape, (x.dtype,))
        if not h.is_contiguous():
            raise ValueError(f"h must be contiguous; got strides {h.stride()}")
    if not (u.noise_weights is u.mask is u.known is u.net_input is u.nonfinite is None):
        _check_extras(u)


def _check_extras(u: UpdateArguments) -> None:
    shape, floats = u.x.shape, (torch.float32, torch.float64)
    if (u.mask is None) != (u.known is None):
        raise ValueError("mask and known come together; only one of them was given")
    if u.noise_weights is not None:
        _expect("noise_weights", u.noise_weights, (shape[0], 2), floats)
    if u.mask is not None and u.known is not None:
        _expect("mask", u.mask, shape, (torch.bool,))
        _expect("known", u.known, shape, floats)
    if u.net_input is not None:
        _expect("net_input", u.net_input, shape, KERNEL_DTYPES)
        if not is_dense(u.net_input):
            strides = u.net_input.stride()
            raise ValueError(f"net_input must be contiguous or channels-last; got {strides}")
    if u.nonfinite is not None:
        _expect("nonfinite", u.nonfinite, shape[:1], (torch.int32,))
        if not u.nonfinite.is_contiguous():
            raise ValueError(f"nonfinite must be contiguous; got {u.nonfinite.stride()}")
    _expect_device(
        u.x,
        noise_weights=u.noise_weights,
        mask=u.mask,
        known=u.known,
        net_input=u.net_input,
        nonfinite=u.nonfinite,
    )


def is_unobserved(*tensors: Tensor) -> bool:
    """Returns whether no compiler, dispatch mode or derivative needs to see the op.

    Such a call skips the dispatcher, whose Python path costs 25 us or more.
    """
    return not (
        torch.compiler.is_compiling()
        or _in_dispatch_mode()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or type(tensors[0]) is not Tensor
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def in_transform() -> bool:
    """Returns whether a torch.func transform is active; its tensors have no data pointer."""
    if torch.compiler.is_compiling():
        return False
    return _interpreter() is not None
