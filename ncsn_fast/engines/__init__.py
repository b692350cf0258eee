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


def pick(name: str, device: str | torch.device | None) -> tuple[type[Engine], torch.device, str]:
    """The engine class of a name, the device it shall run on, and the reason for the choice.

    Args:
        device: None takes what the engine prefers: a GPU, where it can use one and there is one.

    Raises:
        EngineUnavailable: the engine cannot run here; names those that can.
        ValueError: there is no engine of that name, or it does not run on that device.
    """
    gpu = torch.cuda.is_available()
    if device is not None and torch.device(device).type == "cuda" and not gpu:
        raise ValueError(f"device {str(device)!r}: torch sees no NVIDIA GPU; use device='cpu'")
    if name == "auto":
        on_cpu = torch.device(device).type == "cpu" if device is not None else not gpu
        name, reason = ("cpu", "our kernels") if on_cpu else ("eager", "the only one for GPUs yet")
    else:
        reason = "asked for"
    rows = {row.name: row for row in availability()}
    if name not in rows:
        raise ValueError(f"engine must be auto, {', '.join(rows)}; got {name!r}")
    if rows[name].problem is not None:
        runnable = ", ".join(row.name for row in rows.values() if row.problem is None)
        raise EngineUnavailable(
            f"engine {name!r} ({rows[name].summary}) cannot run here: {rows[name].problem}. "
            f"Engines that run here: {runnable}"
        )
    kind = ENGINES[name]
    if device is None:
        device = "cuda" if gpu and "cuda" in kind.device_types else "cpu"
    if torch.device(device).type not in kind.device_types:
        raise ValueError(
            f"engine {name!r} runs on {' or '.join(kind.device_types)}; got device {str(device)!r}"
        )
    return kind, torch.device(device), reason


__all__ = ["Availability", "Engine", "EngineError", "EngineUnavailable", "availability", "pick"]
