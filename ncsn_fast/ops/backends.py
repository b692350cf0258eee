"""Choice of the kernels that run the ops: the requested backend, and what this machine supports.

CUDA tensors have two families of kernels: "triton" (`ncsn_fast.kernels`) and "cuda" (the compiled
extension, `ncsn_fast.ops.native`). If the caller requests a family that cannot run, the op raises
RuntimeError; if the choice is left open, the other family runs and a warning is logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ncsn_fast.ops import tiles
from ncsn_fast.ops.extension import _C, default_isa, isa_number
from ncsn_fast.ops.extension import forced_isa as forced_isa

BACKENDS = ("kernels", "reference", "triton", "cuda")
DEFAULT_FAMILY = "triton"  # for norms, until a committed GPU benchmark shows "cuda" is faster
backend_name: ContextVar[str] = ContextVar("ncsn_fast_backend", default="kernels")

_logger = logging.getLogger("ncsn_fast")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops of the `with` block on "kernels" (the default) or "reference" (plain PyTorch).

    "triton" and "cuda" select one family of kernels for CUDA tensors; if that family cannot run,
    the ops raise RuntimeError. CPU tensors have only one family.
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
    """Forces the CPU kernels inside the `with` block to an instruction set.

    Args:
        level: "scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni" or "amx"; or "amx_emulated",
            on every machine, for tests of what runs in the tiles of AMX. The environment variable
            NCSN_FAST_ISA sets it for a whole process.
    """
    token = forced_isa.set(isa_number(level, f"isa({level!r})"))
    try:
        yield
    finally:
        forced_isa.reset(token)


def available() -> dict[str, Any]:
    """Returns how the extension was built and what this machine supports.

    Build: `version`, `compiler`, `isa_levels`, `sanitizers`, `cuda_*`. Machine: `isa_usable`,
    `isa_default`, `amx` (whether it is used, and why not), `cuda_devices`.
    """
    return {
        **_C.build_info(),
        "isa_usable": _C.isa_levels(),
        "isa_default": default_isa(),
        "amx": tiles.state(),
        "cuda_devices": _C.cuda_device_count(),
    }


@functools.cache
def missing(family: str) -> str:
    """Returns why a kernel family cannot run and how to install it; "" if it can run."""
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
    """Logs a warning, once per text and process."""
    _logger.warning(text)


def family(default: str) -> str:
    """Returns the family that runs an op: the requested one, else `default`, else the other."""
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
    """Returns whether Triton can run an op that no other family implements; warns if it cannot.

    Raises RuntimeError instead if the caller requested Triton.
    """
    if backend_name.get() == "triton":
        return family("triton") == "triton"
    if missing("triton"):
        _warn(f"{missing('triton')}. {what} of CUDA tensors runs in plain PyTorch.")
    return not missing("triton")
