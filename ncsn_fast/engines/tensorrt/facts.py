"""Facts that a TensorRT plan depends on, which form its cache key, and plan files with facts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ncsn_fast.engines.base import EngineError
from ncsn_fast.engines.onnx.model import graph_digest, package_version
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt.builder import Profile, Settings
from ncsn_fast.engines.tensorrt.plan_cache import PlanRefused, Stored, kernels_digest, read_plan
from ncsn_fast.models.score import ScoreModel

_KIND = "TensorRT engine"
_AGAIN = "write it with `python -m ncsn_fast.export --format trt`"


def facts_of(
    trt: ModuleType,
    device: torch.device,
    model: ScoreModel,
    onnx: bytes,
    dtype: str,
    settings: Settings,
) -> dict[str, Any]:
    """Returns everything that the plan of a model's ONNX content depends on."""
    refit = settings.refit
    return {
        "kind": _KIND,
        "package": package_version("ncsn_fast"),
        "kernels": kernels_digest(),
        "graph": graph_digest(onnx, weights=not refit),
        **({} if refit else {"model": model.digest()}),
        **trt_api.machine(trt, device),
        "dtype": dtype,
        "tf32": settings.tf32,
        "level": settings.level,
        "workspace": settings.workspace,
        "refit": refit,
        "shapes": str(settings.profile),
        "batch": list(settings.profile.batch),
        "size": [list(size) for size in settings.profile.size],
    }


def read_file(path: str | Path) -> tuple[Stored, Settings]:
    """Reads a plan file of this user, and the settings it was built with.

    Raises:
        EngineError: there is no such file.
        PlanRefused: it belongs to another user, is damaged, or is no plan.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file; {_AGAIN}")
    found = read_plan(path)
    facts = found.facts
    if facts.get("kind") != _KIND:
        raise PlanRefused(path, "is no TensorRT engine", _AGAIN)
    try:
        least, usual, largest = ((h, w) for h, w in facts["size"])
        profile = Profile(tuple(facts["batch"]), (least, usual, largest))
        options = {name: facts[name] for name in ("tf32", "level", "workspace", "refit")}
        return found, Settings(profile, **options)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanRefused(path, "was written by another version of ncsn_fast", _AGAIN) from error
