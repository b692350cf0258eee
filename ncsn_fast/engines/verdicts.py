"""Memory of precision checks, so that a model is checked once per machine and not at every start.

A verdict is a small JSON file in the cache folder, named by the hash of everything that the check
depends on. A file that cannot be used is ignored, and the check is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ncsn_fast.data import files
from ncsn_fast.data.json_file import read_json
from ncsn_fast.engines import installation
from ncsn_fast.engines.base import PrecisionError
from ncsn_fast.notices import notice

log = logging.getLogger(__name__)
# Environment variables that choose other kernels.
_LEVELS = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "NCSN_FAST_ISA",
)  # fmt: skip


def remembered(facts: Mapping[str, Any], check: Callable[[], float]) -> float:
    """Returns the error found by a check with these facts, now or at an earlier start.

    Args:
        facts: what the check depends on beside the package and the machine: model, engine, dtype,
            algorithm, device. Values that JSON can hold.
        check: returns the largest relative error, or raises PrecisionError.

    Raises:
        PrecisionError: the check refuses the engine, now or at an earlier start.
    """
    path = _path({**_machine(), **facts})
    known = _read(path)
    if known is not None:
        if "refused" in known:
            raise PrecisionError(*known["refused"])
        return float(known["error"])
    try:
        error = check()
    except PrecisionError as refusal:
        remedy = str(refusal).removeprefix(refusal.reason).removeprefix("; ")
        _write(path, {"refused": [refusal.reason, remedy], "facts": dict(facts)})
        raise
    _write(path, {"error": error, "facts": dict(facts)})
    return error


def _machine() -> dict[str, Any]:
    """Returns the versions and the parts of this machine that a result can depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    names = ("model name", "flags", "Features")
    return {
        "ncsn_fast": installation.digest(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": sorted({line for line in lines if line.startswith(names)}),
        "levels": {name: os.environ[name] for name in _LEVELS if name in os.environ},
    }


def _path(facts: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return files.cache_folder() / "precision" / f"{key[:32]}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """Returns a verdict as it was written, or None if there is none or it is damaged."""
    try:
        known = read_json(path)
        if "refused" in known:
            reason, remedy = known["refused"]
            intact = isinstance(reason, str) and isinstance(remedy, str)
        else:
            intact = math.isfinite(known["error"]) and known["error"] >= 0
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return known if intact else None


def _write(path: Path, verdict: dict[str, Any]) -> None:
    try:
        with files.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(verdict))
    except OSError as error:
        notice(log, "%s; this model is checked again next time", error)
