"""Registry of engines: which exist, which run on this machine, and which one `auto` picks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ncsn_fast.engines.base import (
    DamagedModelError,
    Engine,
    EngineError,
    EngineUnavailable,
    PrecisionError,
)
from ncsn_fast.engines.compiled import CompileEngine
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.onnx.engine import OrtEngine
from ncsn_fast.engines.tensorrt.engine import TrtEngine
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.names import suggestion

log = logging.getLogger(__name__)
ENGINES: dict[str, type[Engine]] = {
    "cuda": CudaEngine,
    "cpu": CpuEngine,
    "eager": EagerEngine,
    "compile": CompileEngine,
    "ort": OrtEngine,
    "trt": TrtEngine,
}

OWN = (CpuEngine, CudaEngine)  # what "auto" means on a CPU and on a GPU


@dataclasses.dataclass(frozen=True)
class Availability:
    """A row of `doctor`'s table; `problem` is None if the engine runs here."""

    name: str
    summary: str
    problem: str | None


def availability() -> list[Availability]:
    """Lists every engine and whether it runs on this machine."""
    return [Availability(name, kind.summary, kind.unavailable()) for name, kind in ENGINES.items()]


def named(name: str) -> type[Engine]:
    """Returns the engine class registered under a name.

    Raises:
        EngineUnavailable: the engine cannot run here; the message lists those that can.
        ValueError: no engine has this name.
    """
    if name not in ENGINES:
        raise ValueError(
            f"engine must be auto, {', '.join(ENGINES)}; got {name!r}{suggestion(name, ENGINES)}"
        )
    kind = ENGINES[name]
    problem = kind.unavailable()
    if problem is None:
        return kind
    runnable = ", ".join(row.name for row in availability() if row.problem is None)
    raise EngineUnavailable(
        f"engine {name!r} ({kind.summary}) cannot run here: {problem}. "
        f"Engines that run here: {runnable}"
    )


def pick(
    name: str, device: str | torch.device | None, model: ScoreModel | None = None
) -> tuple[type[Engine], torch.device, str]:
    """Returns the engine class for a name, its device, and the reason for the choice.

    Args:
        device: None for the engine's preference: a GPU if it supports one and one is present.
        model: the model to run; "auto" skips engines that refuse it.

    Raises:
        EngineUnavailable: the engine cannot run here; the message lists those that can.
        ValueError: no engine has this name, or it does not run on that device.
    """
    gpu = torch.cuda.is_available()
    device = None if device is None else _device(device)
    if device is not None and device.type == "cuda":
        _check_gpu(device)
    if name == "auto":
        on_cpu = device.type == "cpu" if device is not None else not gpu
        name, reason = _automatic(CpuEngine if on_cpu else CudaEngine, model)
    else:
        reason = "asked for"
    kind = named(name)
    refusal = None if model is None else kind.refuses(model)
    if refusal is not None:
        raise EngineUnavailable(f"engine {name!r} {refusal}; use engine='eager'")
    if device is None:
        device = torch.device("cuda" if gpu and "cuda" in kind.device_types else "cpu")
    if device.type not in kind.device_types:
        raise ValueError(
            f"engine {name!r} runs on {' or '.join(kind.device_types)}; got device {str(device)!r}"
        )
    if device.type == "cuda" and device.index is None:  # the current device may change later
        begun = torch.cuda.is_initialized()  # current_device() would initialise CUDA
        device = torch.device("cuda", torch.cuda.current_device() if begun else 0)
    return kind, device, reason


def build(
    kind: type[Engine],
    model: ScoreModel,
    dtype: str | None = None,
    *,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
    automatic: bool = False,
    **settings: Any,
) -> Engine:
    """Builds the fastest variant of an engine that is precise enough for the model.

    Tries algorithms, then more precise dtypes, and with `automatic` finally engine "eager". One
    warning says why the first variant was not used and what that costs.

    Args:
        dtype: None tries several. A given dtype and given `options` are kept.
        automatic: whether the engine was chosen by "auto".

    Raises:
        PrecisionError: what was asked for is not precise enough; says which settings to omit.
        EngineError: the model is damaged, or what was asked for cannot be built.
    """
    options = options or {}
    attempts = kind.attempts(device, dtype, options, settings.get("threads"))
    refusals: list[RuntimeError] = []
    for attempt in attempts:
        try:
            engine = kind(model, device=device, **attempt, **settings)
        except (DamagedModelError, torch.OutOfMemoryError):
            raise  # no other variant would run it
        except RuntimeError as error:
            if not (automatic or isinstance(error, PrecisionError)):
                raise
            refusals.append(error)
            continue
        if refusals:
            cost = kind.slowdown(attempts[0], attempt, settings.get("threads"))
            _warn(engine, refusals[0], cost)
        return engine
    given = [*(["dtype"] if dtype not in (None, "fp32") else []), *options]
    if given or not automatic:
        raise _with_remedy(refusals[-1], given)
    engine = EagerEngine(model, device=device, dtype="fp32", **settings)
    _warn(engine, refusals[-1])
    return engine


def _with_remedy(error: RuntimeError, given: list[str]) -> RuntimeError:
    """Returns the error of an engine that was asked for, with the settings to omit."""
    if not isinstance(error, PrecisionError):
        return error
    omitting = f" and omit {' and '.join(given)}" if given else ""
    remedy = f"use engine='auto'{omitting}: it takes the fastest variant that is precise enough"
    return PrecisionError(error.reason, remedy)


def _warn(engine: Engine, error: RuntimeError, cost: float | None = None) -> None:
    """Warns why an engine replaces the one tried first, and what that costs."""
    slower = "which is slower" if cost is None else f"which takes about {cost:.2g} times as long"
    reason, hope = str(error), ""
    if isinstance(error, PrecisionError):
        reason, hope = error.reason, "; a trained model usually passes"
    text = "%s. Engine %r computes in %s instead, %s%s"
    log.warning(text, reason, engine.name, engine.variant, slower, hope)


def _device(device: str | torch.device) -> torch.device:
    """Returns a torch.device; ValueError for what is none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {device!r}") from error


def _check_gpu(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: torch sees no NVIDIA GPU; use device='cpu'")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count > 0:
        raise ValueError(f"device {str(device)!r}: torch sees {count} GPUs, counted from 0")


def _automatic(best: type[Engine], model: ScoreModel | None) -> tuple[str, str]:
    """Returns the engine that "auto" takes, and why; `best` is our own for the device."""
    problem = best.unavailable() or (None if model is None else best.refuses(model))
    if problem is not None:
        return "eager", f"engine {best.name!r} {problem}"
    return best.name, "our kernels"


__all__ = [
    "Availability",
    "Engine",
    "EngineError",
    "EngineUnavailable",
    "availability",
    "build",
    "named",
    "pick",
]
