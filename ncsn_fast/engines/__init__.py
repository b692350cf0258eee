"""Engines by name: which exist, which run on this machine, and which one `auto` means."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from ncsn_fast.engines.base import Engine, EngineError, EngineUnavailable
from ncsn_fast.engines.cpu import CpuEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.models.score import ScoreModel

log = logging.getLogger(__name__)
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


def pick(
    name: str, device: str | torch.device | None, model: ScoreModel | None = None
) -> tuple[type[Engine], torch.device, str]:
    """The engine class of a name, the device it shall run on, and the reason for the choice.

    Args:
        device: None takes what the engine prefers: a GPU, where it can use one and there is one.
        model: what it shall run; "auto" passes over engines that refuse it.

    Raises:
        EngineUnavailable: the engine cannot run here; names those that can.
        ValueError: there is no engine of that name, or it does not run on that device.
    """
    gpu = torch.cuda.is_available()
    if device is not None and torch.device(device).type == "cuda" and not gpu:
        raise ValueError(f"device {str(device)!r}: torch sees no NVIDIA GPU; use device='cpu'")
    if name == "auto":
        on_cpu = torch.device(device).type == "cpu" if device is not None else not gpu
        name, reason = _automatic(model) if on_cpu else ("eager", "the only one for GPUs yet")
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
    refusal = None if model is None else kind.refuses(model)
    if refusal is not None:
        raise EngineUnavailable(f"engine {name!r} {refusal}; use engine='eager'")
    if device is None:
        device = "cuda" if gpu and "cuda" in kind.device_types else "cpu"
    if torch.device(device).type not in kind.device_types:
        raise ValueError(
            f"engine {name!r} runs on {' or '.join(kind.device_types)}; got device {str(device)!r}"
        )
    return kind, torch.device(device), reason


def build(kind: type[Engine], model: ScoreModel, dtype: str | None, **settings: Any) -> Engine:
    """An engine in the given type.

    With None, in the fastest type in which the model keeps its precision; a warning tells where
    that is not the engine's own choice.
    """
    chosen = dtype or kind.default_dtype()
    try:
        return kind(model, dtype=chosen, **settings)
    except EngineError as error:
        if dtype is not None or chosen == "fp32":
            raise
        log.warning("computing in fp32, which is slower: %s", error)
        return kind(model, dtype="fp32", **settings)


def _automatic(model: ScoreModel | None) -> tuple[str, str]:
    """The engine that "auto" takes on a CPU, and why."""
    problem = CpuEngine.unavailable() or (None if model is None else CpuEngine.refuses(model))
    if problem is not None:
        return "eager", f"engine 'cpu' {problem}"
    return "cpu", "our kernels"


__all__ = [
    "Availability",
    "Engine",
    "EngineError",
    "EngineUnavailable",
    "availability",
    "build",
    "pick",
]
