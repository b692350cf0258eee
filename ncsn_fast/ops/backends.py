"""Which kernels the ops run: the backend asked for, and what this machine has.

CUDA tensors have two families of kernels: "triton" (`ncsn_fast.kernels`) and "cuda", those of the
extension (`ncsn_fast.ops.native`). A family that was asked for and cannot run raises RuntimeError;
where the choice was left open the other one runs instead, and the log says so once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ncsn_fast.ops.extension import _C
from ncsn_fast.ops.extension import forced_isa as forced_isa

BACKENDS = ("kernels", "reference", "triton", "cuda")
DEFAULT_FAMILY = "triton"  # of norms: until a committed benchmark on a GPU says otherwise
backend_name: ContextVar[str] = ContextVar("ncsn_fast_backend", default="kernels")

_ISA_LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2}
_logger = logging.getLogger("ncsn_fast")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops of the block on "kernels" (the default) or "reference" (plain PyTorch).

    "triton" and "cuda" are "kernels" of that family alone for CUDA tensors; where it cannot run,
    ops raise RuntimeError. CPU tensors have one family.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    token = backend_name.set(name)
    try:
        yield
    finally:
        backend_name.reset(token)


@contextmanager
def isa(level: str) -> Iterator[None]:
    """Forces the CPU kernels of the block to "scalar", "avx2" or "avx512"."""
    usable = _C.isa_levels()
    if level not in usable:
        raise ValueError(f"the levels of this machine are {', '.join(usable)}; got {level!r}")
    token = forced_isa.set(_ISA_LEVELS[level])
    try:
        yield
    finally:
        forced_isa.reset(token)


def available() -> dict[str, Any]:
    """How the extension was built, and what this machine offers it.

    Built: `version`, `compiler`, `isa_levels`, `cuda_*`. Here: `isa_usable`, `isa_default`,
    `cuda_devices`.
    """
    return {
        **_C.build_info(),
        "isa_usable": _C.isa_levels(),
        "isa_default": _C.default_isa(),
        "cuda_devices": _C.cuda_device_count(),
    }


@functools.cache
def missing(family: str) -> str:
    """What a family lacks here and how to get it; empty if it can run."""
    if family == "triton":
        found = importlib.util.find_spec("triton") is not None
        return "" if found else "Triton is not installed: pip install triton (Linux)"
    if _C.build_info()["cuda_built"]:
        return ""
    return (
        "the extension was built without CUDA: rebuild it with nvcc on PATH "
        "(NCSN_FAST_CUDA=1 pip install .)"
    )


@functools.cache
def _warn(text: str) -> None:
    """Once per text and process."""
    _logger.warning(text)


def family(default: str) -> str:
    """The family that runs an op: the one asked for, else `default`, else the other one."""
    asked = backend_name.get()
    if asked in ("triton", "cuda"):
        if missing(asked):
            raise RuntimeError(f"ops.backend({asked!r}) cannot run: {missing(asked)}")
        return asked
    other = "cuda" if default == "triton" else "triton"
    if not missing(default):
        return default
    if missing(other):
        raise RuntimeError(
            f"no kernels for CUDA tensors: {missing(default)}; or {missing(other)}. Plain PyTorch "
            'runs under ops.backend("reference").'
        )
    _warn(f"{missing(default)}. CUDA tensors use the {other!r} kernels instead.")
    return other


def has_triton(what: str) -> bool:
    """Whether Triton runs what no other family has; a warning, or RuntimeError if asked for."""
    if backend_name.get() == "triton":
        return family("triton") == "triton"
    if missing("triton"):
        _warn(f"{missing('triton')}. {what} of CUDA tensors runs in plain PyTorch.")
    return not missing("triton")
