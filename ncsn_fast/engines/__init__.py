"""Engines by name: which exist, which run on this machine, and which one `auto` means."""

from __future__ import annotations

import dataclasses

import torch

from ncsn_fast.engines.base import Engine, EngineError, EngineUnavailable
from ncsn_fast.engines.cpu import CpuEngine
from ncsn_fast.engines.eager import EagerEngine

ENGINES: dict[str, type[Engine]] = {"cpu": CpuEngine, "eager": EagerEngine}

# Engines of the design that this version does not contain, and what each is for.
PLANNED = {
    "compile": "torch.compile",
    "cuda": "CUDA graphs and our GPU kernels",
    "ort": "ONNX Runtime",
    "trt": "TensorRT",
}


@dataclasses.dataclass(frozen=True)
class Availability:
    """One row of `doctor`'s table: problem is None where the engine runs."""

    name: str
    summary: str
    problem: str | None


def availability() -> list[Availability]:
    """Every engine of the design, and whether it runs on this machine."""
    rows = [Availability(name, kind.summary, kind.unavailable()) for name, kind in ENGINES.items()]
    return rows + [
        Availability(name, what, "not part of this version; upgrade ncsn_fast when it is released")
        for name, what in PLANNED.items()
    ]


def pick(name: str, device: torch.device) -> tuple[type[Engine], str]:
    """The engine class of a name and the reason for it.

    Raises:
        EngineUnavailable: the engine cannot run here; names those that can.
        ValueError: there is no engine of that name.
    """
    if name == "auto":
        if device.type == "cpu":
            return CpuEngine, "fastest engine on this machine's CPU"
        return EagerEngine, f"the only engine of this version on {device.type}"
    rows = {row.name: row for row in availability()}
    if name not in rows:
        raise ValueError(f"engine must be auto, {', '.join(rows)}; got {name!r}")
    problem = rows[name].problem
    if problem is None and name == "cpu" and device.type != "cpu":
        problem = f"it runs on the CPU only, and device is {device}"
    if problem is not None:
        runnable = ", ".join(row.name for row in rows.values() if row.problem is None)
        raise EngineUnavailable(
            f"engine {name!r} ({rows[name].summary}) cannot run here: {problem}. "
            f"Engines that run here: {runnable}"
        )
    return ENGINES[name], "asked for"


__all__ = ["Availability", "Engine", "EngineError", "EngineUnavailable", "availability", "pick"]
