"""TensorRT's Python module: import, log, errors, and the machine facts that a plan depends on.

Everything in `engines/tensorrt/` takes the module as a parameter, `trt`: `tensorrt` 10 or 11, or a
module with the same interface (tensorrt_rtx; the test double). Most of its functions report failure
by returning None or False, with the reason in a log; here both become one exception.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from ncsn_fast.engines.base import EngineError, EngineUnavailable
from ncsn_fast.ops import backends

_log = logging.getLogger(__name__)
MIN_VERSION, MAX_VERSION = (10, 16), (12, 0)
_REQUIREMENTS = {"tensorrt": "'tensorrt>=10.16,<12'", "onnx": "onnx"}
TESTED = ("10.16", "11.4")  # versions whose interfaces the tests check every call against
_MAX_REASONS = 3
_DRIVER = Path("/proc/driver/nvidia/version")
T = TypeVar("T")


def problem() -> str | None:
    """Returns why the engine cannot run here and what to do, or None; imports tensorrt last."""
    lacks = []
    if not torch.cuda.is_available():
        lacks.append(
            "torch sees no NVIDIA GPU (it needs a GPU, its driver and a CUDA build of torch)"
        )
    missing = [name for name in _REQUIREMENTS if not _installed(name)]
    if missing:
        words = " ".join(_REQUIREMENTS[name] for name in missing)
        lacks.append(f"{' and '.join(missing)} not installed: pip install {words}")
    if lacks:
        return "; ".join(lacks)
    try:
        load()
    except EngineUnavailable as error:
        return str(error)
    return backends.missing("triton") or None


def load() -> ModuleType:
    """Imports `tensorrt`.

    Raises:
        EngineUnavailable: it does not import, or its version is not in [MIN_VERSION, MAX_VERSION).
    """
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise EngineUnavailable(
            f"tensorrt does not import ({error}): "
            f"pip install --force-reinstall {_REQUIREMENTS['tensorrt']}"
        ) from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if not MIN_VERSION <= version < MAX_VERSION:
        raise EngineUnavailable(
            f"tensorrt {trt.__version__} is not from 10.16 to 11: "
            f"pip install {_REQUIREMENTS['tensorrt']}"
        )
    if not trt.__version__.startswith(TESTED):
        _log.info("tensorrt %s: tested are %s", trt.__version__, " and ".join(TESTED))
    return trt


@functools.cache
def get_logger(trt: ModuleType) -> Any:
    """Returns TensorRT's logger, which keeps errors until `reasons()` asks for them.

    One for the whole process: TensorRT keeps using the first logger, whichever it is given later.
    Warnings and lower severities go to Python's logging.
    """

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                _log.info("%s", msg)
            else:
                _log.debug("%s", msg)

        def reasons(self) -> str:
            """Returns the errors logged since the last call, shortened."""
            errors, self.errors = self.errors, []
            shown = errors[:_MAX_REASONS]
            if len(errors) > len(shown):
                shown.append(f"and {len(errors) - len(shown)} more")
            return "; ".join(shown) or "it gave no reason"

    return Log()


def create(kind: Any, log: Any) -> Any:
    """Creates a Builder or Runtime.

    Raises:
        EngineUnavailable: there is no working driver (their constructors raise TypeError).
    """
    try:
        return kind(log)
    except TypeError as error:
        raise EngineUnavailable(
            f"TensorRT cannot use this machine's GPU ({log.reasons()}); install an NVIDIA driver "
            f"for CUDA {torch.version.cuda or '13'} and see that nvidia-smi works, or use "
            "engine='cuda' or 'cpu'"
        ) from error


def checked(value: T | None, failed: str, log: Any, remedy: str) -> T:
    """Returns the value, unless it is None or False, by which TensorRT reports failure.

    Raises:
        EngineError: the call failed; with TensorRT's reasons.
    """
    if value is None or value is False:
        raise EngineError(f"TensorRT {failed}: {log.reasons()}; {remedy}")
    return value


def driver() -> str:
    """Returns the version line of NVIDIA's Linux driver, or "unknown"."""
    return _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else "unknown"


def machine(trt: ModuleType, device: torch.device) -> dict[str, Any]:
    """Returns the versions, driver and GPU that a plan and its timings depend on."""
    facts: dict[str, Any] = {"tensorrt": trt.__version__, "cuda": torch.version.cuda}
    facts["driver"] = driver()
    if device.type != "cuda":
        return {**facts, "gpu": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        **facts,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
