"""Calls into the compiled extension, which takes arrays (`ops.addresses`) in place of tensors.

Arguments of users have already been checked (`ops.checks`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.ops.activations import activation_code
from ncsn_fast.ops.addresses import DENSE, NCHW, NHWC, NONE, array
from ncsn_fast.ops.checks import KERNEL_DTYPES, UpdateArguments

try:
    from ncsn_fast import _C
except ImportError as error:
    raise ImportError(
        f"The compiled extension ncsn_fast._C could not be imported ({error}). It is built by "
        "`pip install .` (in a checkout: `pip install -e .`), which needs a C++20 compiler."
    ) from error

ISA_LEVELS = {
    "scalar": 0, "avx2": 1, "avx2_vnni": 2, "avx512": 3, "avx512_vnni": 4, "amx": 5,
    "amx_emulated": 6,
}  # fmt: skip
# Those at which the cpu engine convolves in tiles. The second, for tests, is the machine's best one
# below AMX: kernels in tiles are emulated at every level but "amx".
AMX_LEVELS = ("amx", "amx_emulated")


def isa_number(level: str, where: str) -> int:
    """The extension's number of a level that this machine has; ValueError names those."""
    usable = _C.isa_levels()
    if level not in usable and level != "amx_emulated":
        raise ValueError(f"{where}: the levels of this machine are {', '.join(usable)}")
    return ISA_LEVELS[level]


def default_isa() -> str:
    """The level of the CPU kernels where `ops.isa` forces none."""
    return os.environ.get("NCSN_FAST_ISA") or _C.default_isa()


def level_name(number: int) -> str:
    """Returns the name of a level; of this machine's best one for -1."""
    names = {code: name for name, code in ISA_LEVELS.items()}
    return _C.default_isa() if number == -1 else names[number]


_forced = os.environ.get("NCSN_FAST_ISA")
_number = isa_number(_forced, f"NCSN_FAST_ISA={_forced}") if _forced else -1
# The level of the CPU kernels that `ops.isa` or the environment forces; -1 is this machine's best.
forced_isa: ContextVar[int] = ContextVar("ncsn_fast_isa", default=_number)


def instance_norm_plus(
    x: Tensor, parameters: Sequence[Tensor], out: Tensor, elu: bool, eps: float, isa: int
) -> None:
    """Runs the CPU kernel; x and out are dense and share one layout."""
    alpha, gamma, beta = parameters
    per_sample = alpha.ndim == 2 or gamma.ndim == 2 or beta.ndim == 2
    n, c, height, width = shape = x.shape
    layout = NCHW if x.is_contiguous() else NHWC
    row = (n, c) if per_sample else (c,)
    alpha, gamma, beta = _in_rows(alpha, row), _in_rows(gamma, row), _in_rows(beta, row)
    _C.instance_norm_plus(
        array("x", x, shape, x.dtype, layout=layout),
        array("out", out, shape, out.dtype, layout=layout),
        array("alpha", alpha, row, torch.float32), array("gamma", gamma, row, torch.float32),
        array("beta", beta, row, torch.float32),
        n, c, height * width, layout is NHWC, per_sample, x.dtype is torch.bfloat16,
        out.dtype is torch.bfloat16, elu, eps, NONE, width, DENSE, isa,
    )  # fmt: skip


def group_norm(
    x: Tensor,
    groups: int,
    parameters: Sequence[Tensor | None],
    out: Tensor,
    activation: str,
    eps: float,
    isa: int,
) -> None:
    """Runs the CPU kernel; x and out are dense and share one layout.

    Args:
        parameters: gamma, beta (C,), add, scale and shift (N, C).
    """
    n, c, height, width = shape = x.shape
    layout = NCHW if x.is_contiguous() and out.is_contiguous() else NHWC
    rows = ((c,), (c,), (n, c), (n, c), (n, c))
    held = [  # keeps copies made here alive until the kernel has read them
        None if t is None else _in_rows(t, row) for t, row in zip(parameters, rows, strict=True)
    ]
    names = ("gamma", "beta", "add", "scale", "shift")
    gamma, beta, add, scale, shift = (
        array(name, t, row, torch.float32) for name, t, row in zip(names, held, rows, strict=True)
    )
    _C.group_norm(
        array("x", x, shape, x.dtype, layout=layout),
        array("out", out, shape, out.dtype, layout=layout),
        gamma, beta, add, scale, shift, n, c, height * width, groups, layout is NHWC,
        x.dtype is torch.bfloat16, out.dtype is torch.bfloat16, activation_code(activation), eps,
        NONE, width, DENSE, isa,
    )  # fmt: skip


def channel_moments(x: Tensor, isa: int) -> Tensor:
    """Returns (N, 2, C) float64: the means of a dense x over H and W, and the biased variances."""
    n, c, height, width = shape = x.shape
    layout = NCHW if x.is_contiguous() else NHWC
    out = torch.empty(n, 2, c, dtype=torch.float64)
    _C.channel_moments(
        array("x", x, shape, x.dtype, layout=layout), array("out", out, (n, 2, c), torch.float64),
        (n, c, height * width), layout is NHWC, x.dtype is torch.bfloat16, isa,
    )  # fmt: skip
    return out


def norm_gradient(
    x: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    activation: str,
    *,
    sums: Tensor | None = None,
    out: Tensor | None = None,
    isa: int,
) -> None:
    """Runs the CPU kernel of csrc/include/ncsn_fast/norm_gradients.h.

    Args:
        x, grad, out: maps (N, C, H, W) of one dense layout and dtype.
        rows: (N, 5, C) float32: mean, scale, shift, slope, offset; None for an activation alone.
        sums: (N, 2, C) float64.
    """
    n, c, height, width = shape = x.shape
    layout = NCHW if x.is_contiguous() else NHWC
    maps = (
        array(name, t, shape, x.dtype, layout=layout)
        for name, t in (("x", x), ("grad", grad), ("out", out))
    )
    x_at, grad_at, out_at = maps
    _C.norm_gradient(
        x_at, grad_at, array("rows", rows, (n, 5, c), torch.float32),
        array("sums", sums, (n, 2, c), torch.float64), out_at, (n, c, height * width),
        layout is NHWC, x.dtype is torch.bfloat16, activation_code(activation), isa,
    )  # fmt: skip


def scale_shift(x: Tensor, out: Tensor, activation: str, isa: int) -> None:
    """Runs the CPU kernel of an activation alone; x and out are dense and share one layout."""
    n, c, height, width = shape = x.shape
    layout = NCHW if x.is_contiguous() else NHWC
    _C.scale_shift(
        array("x", x, shape, x.dtype, layout=layout),
        array("out", out, shape, out.dtype, layout=layout),
        NONE, NONE, n, c, height * width, layout is NHWC, x.dtype is torch.bfloat16,
        out.dtype is torch.bfloat16, activation_code(activation), isa,
    )  # fmt: skip


def _in_rows(parameter: Tensor, row: tuple[int, ...]) -> Tensor:
    if parameter.ndim != len(row):
        parameter = parameter.expand(row)
    if parameter.dtype is torch.float32 and parameter.is_contiguous():
        return parameter
    return parameter.to(torch.float32).contiguous()


def sampler_update(u: UpdateArguments, isa: int) -> None:
    """Runs the kernel for x's device, in place on x and h."""
    x, f = u.x, u.f if u.f.dtype in KERNEL_DTYPES else u.f.float()
    f_layout = NCHW if f.is_contiguous() or not f.is_contiguous(memory_format=NHWC) else NHWC
    f = f.contiguous(memory_format=f_layout)
    weights, known = (None if t is None else t.float() for t in (u.noise_weights, u.known))
    # The list keeps copies made here alive until the kernel has read them.
    held = [None if t is None else t.contiguous() for t in (u.samples, weights, u.mask, known)]
    samples, weights, mask, known = held
    net_input, net_dtype = u.net_input, torch.float32
    net_layout = NCHW if net_input is None or net_input.is_contiguous() else NHWC
    if net_input is not None:
        net_dtype = net_input.dtype
    batch, channels, height, width = shape = x.shape
    at = functools.partial(array, device=x.device)
    run, target = _update_kernel(x, isa)
    run(
        at("x", x, shape, torch.float32), at("f", f, shape, f.dtype, layout=f_layout),
        at("h", u.h, shape, torch.float32), batch, channels, height * width,
        f.dtype is torch.bfloat16, f_layout is NHWC, u.row(), u.seed,
        at("samples", samples, (batch,), torch.int64), u.step,
        at("noise_weights", weights, (batch, 2), torch.float32),
        at("mask", mask, shape, torch.bool), at("known", known, shape, torch.float32),
        u.ref_step, at("net_input", net_input, shape, net_dtype, layout=net_layout),
        net_dtype is torch.bfloat16, net_layout is NHWC,
        at("nonfinite", u.nonfinite, (batch,), torch.int32), target,
    )  # fmt: skip


def _update_kernel(x: Tensor, isa: int) -> tuple[Any, int]:
    """Returns the kernel for x's device and its last argument: isa (CPU) or stream (CUDA)."""
    if x.is_cpu:
        return _C.sampler_update, isa
    if not hasattr(_C, "sampler_update_cuda"):
        raise RuntimeError(
            "x is on a CUDA device, but the extension was built without CUDA: rebuild it with nvcc "
            "on PATH (NCSN_FAST_CUDA=1 pip install .)"
        )
    return _C.sampler_update_cuda, torch.cuda.current_stream(x.device).cuda_stream


def noise(
    kind: str, seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int], isa: int
) -> Tensor:
    """Returns CPU noise (B, *shape); `kind` is "uniform" or "normal"."""
    out = torch.empty((len(samples), *shape), dtype=torch.float32)
    _fill(kind, out, math.prod(shape), seed, samples, stream, step, isa)
    return out


def words(seed: int, samples: Tensor, stream: int, step: int, numel: int, isa: int = -1) -> Tensor:
    """Returns the Philox words of `noise.words`, computed by the C++ kernel; for tests."""
    out = torch.empty((len(samples), (numel + 3) // 4, 4), dtype=torch.int32)
    _fill("philox_words", out, numel, seed, samples, stream, step, isa)
    return out.to(torch.int64) & 0xFFFFFFFF


def _fill(
    kind: str, out: Tensor, numel: int, seed: int, samples: Tensor, stream: int, step: int, isa: int
) -> None:
    samples, n = samples.to(torch.int64).contiguous(), len(samples)
    fill = getattr(_C, kind)
    fill(
        array("out", out, tuple(out.shape), out.dtype),
        array("samples", samples, (n,), torch.int64), n, numel, seed, stream, step, isa,
    )  # fmt: skip
