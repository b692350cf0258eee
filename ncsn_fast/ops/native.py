"""Norms and sampler update of the C++ extension, with the Triton launchers' signatures.

CUDA tensors run the CUDA kernels on the current stream; CPU tensors run the CPU kernels, so the
same calls can be tested without a GPU. With `out` and `partials` given, calls neither allocate nor
synchronise and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ncsn_fast.kernels.launch import check_maps
from ncsn_fast.kernels.rows import ROW_WIDTH, Rows
from ncsn_fast.ops import extension
from ncsn_fast.ops.activations import activation_code
from ncsn_fast.ops.addresses import NHWC, NONE, Array, array, misalignment, strided
from ncsn_fast.ops.checks import check_group_norm
from ncsn_fast.ops.extension import _C, forced_isa

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype in csrc/
# Samples up to this size take one launch by default, as in kernels/instance_norm_plus.py.
SINGLE_BYTES = 32 * 1024
SINGLE_CHANNELS = 512


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _kernel(x: Tensor, on_cpu: str, on_cuda: str) -> tuple[Any, int]:
    """Returns the kernel for x's device and its last argument: isa (CPU) or stream (CUDA)."""
    if x.is_cpu:
        return getattr(_C, on_cpu), forced_isa.get()
    if not x.is_cuda:
        raise ValueError(f"x must be on the CPU or on a CUDA device; it is on {x.device}")
    if not hasattr(_C, on_cuda):
        raise RuntimeError(
            "x is on a CUDA device, but the extension was built without CUDA: rebuild it with nvcc "
            "on PATH (NCSN_FAST_CUDA=1 pip install .)"
        )
    return getattr(_C, on_cuda), torch.cuda.current_stream(x.device).cuda_stream


# Instance normalisation++ ------------------------------------------------------------------------


def is_single(x: Tensor) -> bool:
    """Returns whether one launch is the default; depends on C, H, W and dtype only."""
    sample_bytes = x.shape[1] * x.shape[2] * x.shape[3] * x.element_size()
    return x.shape[1] <= SINGLE_CHANNELS and sample_bytes <= SINGLE_BYTES


def new_partials(x: Tensor) -> Tensor:
    """Allocates the workspace (N, tiles, 2, C) float32 of `instance_norm_plus`, uninitialised."""
    check_maps(x=x)
    n, c, height, width = x.shape
    tiles = _C.norm_tiles(c, height * width, DTYPES[x.dtype])
    return torch.empty((n, tiles, 2, c), dtype=torch.float32, device=x.device)


def _in_rows(name: str, parameter: Tensor, x: Tensor) -> Tensor:
    """Returns the parameter in float32 with unit stride."""
    n, c = x.shape[:2]
    if parameter.shape not in ((c,), (n, c)):
        raise ValueError(
            f"{name} must have shape ({c},) or ({n}, {c}) for x of shape {tuple(x.shape)}; got "
            f"{tuple(parameter.shape)}"
        )
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x; it is on {parameter.device}")
    if parameter.dtype != torch.float32 or parameter.stride(-1) != 1:
        parameter = parameter.to(torch.float32).contiguous()
    return parameter


def _row(name: str, parameter: Tensor) -> tuple[Array, int]:
    """A parameter, and the floats between the rows of two samples."""
    return strided(name, parameter), parameter.stride(0) if parameter.ndim == 2 else 0


def _map(name: str, x: Tensor) -> tuple[Array, int]:
    return array(name, x, tuple(x.shape), x.dtype, device=x.device, layout=NHWC), DTYPES[x.dtype]


def _check_norm(x: Tensor, out: Tensor, form: str) -> None:
    check_maps(x=x, out=out)
    if form not in ("auto", "split", "single") or (
        form == "single" and x.shape[1] > SINGLE_CHANNELS
    ):
        raise ValueError(
            f'form must be "auto", "split", or up to {SINGLE_CHANNELS} channels "single"; got '
            f"{form!r} for {x.shape[1]} channels"
        )
    if x.is_cpu and torch.float16 in (x.dtype, out.dtype):
        raise TypeError("on the CPU x and out must be float32 or bfloat16; got float16")
    for name, t in (("x", x), ("out", out)):
        if x.is_cuda and t.shape[1] * t.element_size() % 16 == 0 and misalignment(t, 16):
            raise ValueError(
                f"{name} must begin at a multiple of 16 bytes; it is {misalignment(t, 16)} off. "
                f"Use {name}.clone(memory_format=torch.channels_last)."
            )


def instance_norm_plus(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    elu: bool = False,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    partials: Tensor | None = None,
    form: Literal["auto", "split", "single"] = "auto",
) -> Tensor:
    """Applies `reference.instance_norm_plus` to a channels-last float32, bfloat16 or float16 map.

    Args:
        alpha, gamma, beta: (C,) or (N, C) each; float32 with unit stride is read without a copy.
        bias: (C,) float32; normalises x + bias without writing it.
        out: receives y; shape of x, channels-last, any of the three dtypes; may be x.
        partials: workspace from `new_partials(x)`; unused by the CPU kernel.
        form: two launches ("split"), one ("single", up to 512 channels), or by shape.

    Raises:
        TypeError, ValueError: for anything else, naming what is supported. float16 needs a GPU.
    """
    out = torch.empty_like(x) if out is None else out
    _check_norm(x, out, form)
    n, c, height, width = x.shape
    named = (("alpha", alpha), ("gamma", gamma), ("beta", beta))
    rows = [(name, _in_rows(name, parameter, x)) for name, parameter in named]
    shift = array("bias", bias, (c,), torch.float32, device=x.device)
    kernel, target = _kernel(x, "instance_norm_plus_rows", "instance_norm_plus_cuda")
    if x.numel() == 0:
        return out
    arguments: list[Any] = [
        _map("x", x), _map("out", out), (n, c, height * width), [_row(*row) for row in rows],
        shift, elu, eps,
    ]  # fmt: skip
    if x.is_cuda:
        single = form == "single" or (form == "auto" and is_single(x))
        workspace = NONE
        if not single:
            partials = new_partials(x) if partials is None else partials
            shape = (n, _C.norm_tiles(c, height * width, DTYPES[x.dtype]), 2, c)
            name = "partials (use new_partials(x))"
            workspace = array(name, partials, shape, torch.float32, device=x.device)
        arguments += [workspace, single]
    with _device(x):
        kernel(*arguments, target)
    return out


# Group normalisation -----------------------------------------------------------------------------


def new_workspace(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates partials and coefficients (N, 3, C) of `group_norm`, float32, uninitialised."""
    n, c = x.shape[:2]
    return new_partials(x), torch.empty((n, 3, c), dtype=torch.float32, device=x.device)


def group_norm(
    x: Tensor,
    groups: int,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    out: Tensor | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Applies `reference.group_norm` to a channels-last float32, bfloat16 or float16 map.

    Args:
        gamma, beta: (C,); add, scale, shift: (N, C). Contiguous float32 is read without a copy.
        out: receives y; shape of x, channels-last, any of the three dtypes; may be x.
        workspace: from `new_workspace(x)`; unused by the CPU kernel.

    Raises:
        TypeError, ValueError: for anything else, naming what is supported. float16 needs a GPU.
    """
    out = torch.empty_like(x) if out is None else out
    _check_norm(x, out, "split")
    check_group_norm(
        x, groups, {"gamma": gamma, "beta": beta}, {"add": add, "scale": scale, "shift": shift},
        activation,
    )  # fmt: skip
    parameters = (gamma, beta, add, scale, shift)
    if x.is_cpu:
        extension.group_norm(x, groups, parameters, out, activation, eps, forced_isa.get())
        return out
    held = [None if t is None else t.to(torch.float32).contiguous() for t in parameters]
    kernel, stream = _kernel(x, "group_norm", "group_norm_cuda")
    if x.numel() == 0:
        return out
    with _device(x):
        kernel(
            *group_arguments(x, groups, held, activation, eps, out, workspace or new_workspace(x)),
            stream,
        )
    return out


def group_arguments(
    x: Tensor,
    groups: int,
    parameters: Sequence[Tensor | None],
    activation: str,
    eps: float,
    out: Tensor,
    workspace: tuple[Tensor, Tensor],
) -> tuple[Any, ...]:
    """Those of a CUDA kernel, but for its target; parameters are float32 and contiguous."""
    n, c, height, width = x.shape
    at = functools.partial(array, dtype=torch.float32, device=x.device)
    partials, coefficients = workspace
    tiles = _C.norm_tiles(c, height * width, DTYPES[x.dtype])
    named = zip(("gamma", "beta", "add", "scale", "shift"), parameters, strict=True)
    return (
        _map("x", x), _map("out", out), (n, c, height * width), groups,
        [at(name, t, shape=(c,) if name in ("gamma", "beta") else (n, c)) for name, t in named],
        activation_code(activation), eps,
        at("partials (use new_workspace(x))", partials, shape=(n, tiles, 2, c)),
        at("coefficients (use new_workspace(x))", coefficients, shape=(n, 3, c)),
    )  # fmt: skip


# Sampler update ----------------------------------------------------------------------------------


def _check_map(name: str, t: Tensor, x: Tensor, more_channels: bool) -> None:
    n, c, height, width = x.shape
    channels = t.shape[1] if more_channels and t.ndim == 4 and t.shape[1] > c else c
    if tuple(t.shape) != (n, channels, height, width) or t.device != x.device:
        raise ValueError(
            f"{name} must have the shape of x {tuple(x.shape)}, on {x.device}; got "
            f"{tuple(t.shape)} on {t.device}"
        )
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16; got {t.dtype}")
    if height > 1 and width > 1 and t.stride(2) != width * t.stride(3):
        raise ValueError(
            f"{name} must be contiguous or channels-last, maybe padded with channels; got shape "
            f"{tuple(t.shape)} with strides {t.stride()}"
        )


def _strided(name: str, t: Tensor | None) -> tuple[Array, tuple[int, int, int, int, int]]:
    """Returns a map and (dtype, strides of sample, channel and pixel, channels in memory)."""
    if t is None:
        return NONE, (0, 0, 0, 0, 0)
    height, width = t.shape[2:]
    pixel = t.stride(3) if width > 1 else t.stride(2) if height > 1 else t.stride(0)
    # If x is a channel slice of a padded map, the channels left out are padding.
    whole = t.stride(1) == 1 and pixel >= t.shape[1] and t.storage_offset() % max(pixel, 1) == 0
    end = t.storage_offset() + (t.shape[0] - 1) * t.stride(0) + height * width * pixel
    whole = whole and end * t.element_size() <= t.untyped_storage().nbytes()
    channels = pixel if whole and t.stride(0) >= height * width * pixel else t.shape[1]
    return strided(name, t), (DTYPES[t.dtype], t.stride(0), t.stride(1), pixel, channels)


def sampler_update_(
    x: Tensor,
    f: Tensor,
    h: Tensor | None,
    rows: Rows,
    *,
    seeds: Tensor,
    samples: Tensor,
    noise_weights: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    net_input: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Applies `reference.sampler_update` in place on x and h, with the row at `rows.counter`.

    Neither allocates nor synchronises, so it can be captured in a CUDA graph. The counter does not
    change; see `advance`.

    Args:
        x, h: (B, C, H, W) float32, contiguous.
        f: shape of x, float32, bfloat16 or float16, contiguous or channels-last; may be the first C
            channels of a padded map.
        seeds, samples: (B,) int64 below 2^32, the key of each sample's noise.
        noise_weights: (B, 2) float32.   mask, known: bool and float32, contiguous, shape of x.
        net_input: receives scale x' + shift of the row; (B, C', H, W), C' >= C, any dtype and
            layout allowed for f. Channels C and above, and its padding, are set to zero.
        nonfinite: (B,) int32, set to 1 where a sample's new state is not finite.
    """
    arguments = _update_arguments(
        x, f, h, rows, seeds, samples, noise_weights, mask, known, net_input, nonfinite,
    )  # fmt: skip
    kernel, target = _kernel(x, "sampler_update_rows", "sampler_update_rows_cuda")
    if x.numel() == 0:
        return
    with _device(x):
        kernel(*arguments, target)


def _update_arguments(
    x: Tensor,
    f: Tensor,
    h: Tensor | None,
    rows: Rows,
    seeds: Tensor,
    samples: Tensor,
    noise_weights: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    net_input: Tensor | None,
    nonfinite: Tensor | None,
) -> tuple[Any, ...]:
    """Those of a kernel, but for its target."""
    if x.ndim != 4 or x[:1].numel() >= 2**31:
        raise ValueError(f"x must be (B, C, H, W), below 2**31 a sample; got {tuple(x.shape)}")
    if (mask is None) != (known is None):
        raise ValueError("mask and known come together; only one of them was given")
    n, c, height, width = shape = tuple(x.shape)
    k, at = len(rows.table), functools.partial(array, device=x.device)
    _check_map("f", f, x, more_channels=False)
    if net_input is not None:
        _check_map("net_input", net_input, x, more_channels=True)
    table = (
        at("rows.table", rows.table, (k, ROW_WIDTH), torch.float32),
        at("rows.steps", rows.steps, (k, 2), torch.int64),
        at("rows.counter", rows.counter, (1,), torch.int32),
        k,
    )
    return (
        at("x", x, shape, torch.float32), at("h", h, shape, torch.float32), (n, c, height * width),
        _strided("f", f), table, at("seeds", seeds, (n,), torch.int64),
        at("samples", samples, (n,), torch.int64),
        at("noise_weights", noise_weights, (n, 2), torch.float32),
        at("mask", mask, shape, torch.bool), at("known", known, shape, torch.float32),
        _strided("net_input", net_input),
        at("nonfinite", nonfinite, (n,), torch.int32),
    )  # fmt: skip


def advance(rows: Rows) -> None:
    """Advances the counter to the next row."""
    rows.counter.add_(1)
