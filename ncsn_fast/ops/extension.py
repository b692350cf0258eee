"""Calls into the compiled extension, which takes addresses in place of tensors.

Arguments have already been checked (`ops.checks`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.ops.checks import KERNEL_DTYPES, UpdateArguments

try:
    from ncsn_fast import _C
except ImportError as error:
    raise ImportError(
        f"The compiled extension ncsn_fast._C could not be imported ({error}). It is built by "
        "`pip install .` (in a checkout: `pip install -e .`), which needs a C++20 compiler."
    ) from error

ISA_LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512_vnni": 3}


def isa_number(level: str, where: str) -> int:
    """The extension's number of a level that this machine has; ValueError names those."""
    usable = _C.isa_levels()
    if level not in usable:
        raise ValueError(f"{where}: the levels of this machine are {', '.join(usable)}")
    return ISA_LEVELS[level]


def default_isa() -> str:
    """The level of the CPU kernels where `ops.isa` forces none."""
    return os.environ.get("NCSN_FAST_ISA") or _C.default_isa()


_forced = os.environ.get("NCSN_FAST_ISA")
_number = isa_number(_forced, f"NCSN_FAST_ISA={_forced}") if _forced else -1
# The level of the CPU kernels that `ops.isa` or the environment forces; -1 is this machine's best.
forced_isa: ContextVar[int] = ContextVar("ncsn_fast_isa", default=_number)


def instance_norm_plus(
    x: Tensor, parameters: Sequence[Tensor], out: Tensor, elu: bool, eps: float, isa: int
) -> None:
    """Runs the CPU kernel; x and out are dense and share one layout."""
    per_sample = any(p.ndim == 2 for p in parameters)
    n, c, height, width = x.shape
    alpha, gamma, beta = (_parameter_rows(p, n, per_sample) for p in parameters)
    _C.instance_norm_plus(
        x.data_ptr(),
        out.data_ptr(),
        alpha.data_ptr(),
        gamma.data_ptr(),
        beta.data_ptr(),
        n,
        c,
        height * width,
        not x.is_contiguous(),
        per_sample,
        x.dtype is torch.bfloat16,
        out.dtype is torch.bfloat16,
        elu,
        eps,
        isa,
    )


def _parameter_rows(parameter: Tensor, n: int, per_sample: bool) -> Tensor:
    if per_sample and parameter.ndim == 1:
        parameter = parameter.expand(n, -1)
    if parameter.dtype is torch.float32 and parameter.is_contiguous():
        return parameter
    return parameter.to(torch.float32).contiguous()


def sampler_update(u: UpdateArguments, isa: int) -> None:
    """Runs the kernel for x's device, in place on x and h."""
    f = u.f if u.f.dtype in KERNEL_DTYPES else u.f.float()
    f_channels_last = not f.is_contiguous() and f.is_contiguous(memory_format=torch.channels_last)
    f = f if f_channels_last else f.contiguous()
    weights, known = (None if t is None else t.float() for t in (u.noise_weights, u.known))
    # The list keeps copies made here alive until the kernel has read them.
    held = [None if t is None else t.contiguous() for t in (u.samples, weights, u.mask, known)]
    samples_at, weights_at, mask_at, known_at = map(_address, held)
    batch, channels, height, width = u.x.shape
    run, target = _update_kernel(u.x, isa)
    run(
        u.x.data_ptr(), f.data_ptr(), _address(u.h), batch, channels, height * width,
        f.dtype is torch.bfloat16, f_channels_last, u.coefficients,
        u.seed, samples_at, u.step, weights_at, mask_at, known_at, u.c_ref, u.ref_step,
        _address(u.net_input), u.net_input is not None and u.net_input.dtype is torch.bfloat16,
        u.net_input is not None and not u.net_input.is_contiguous(), u.scale, u.shift,
        _address(u.nonfinite), target,
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


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def noise(
    kind: str, seed: int, samples: Tensor, stream: int, step: int, shape: Sequence[int], isa: int
) -> Tensor:
    """Returns CPU noise (B, *shape); `kind` is "uniform" or "normal"."""
    samples = samples.to(torch.int64).contiguous()
    out = torch.empty((len(samples), *shape), dtype=torch.float32)
    fill = getattr(_C, kind)
    fill(
        out.data_ptr(), samples.data_ptr(), len(samples), math.prod(shape), seed, stream, step, isa
    )
    return out


def words(seed: int, samples: Tensor, stream: int, step: int, numel: int, isa: int = -1) -> Tensor:
    """Returns the Philox words of `noise.words`, computed by the C++ kernel; for tests."""
    samples = samples.to(torch.int64).contiguous()
    out = torch.empty((len(samples), (numel + 3) // 4, 4), dtype=torch.int32)
    _C.philox_words(
        out.data_ptr(), samples.data_ptr(), len(samples), numel, seed, stream, step, isa
    )
    return out.to(torch.int64) & 0xFFFFFFFF
