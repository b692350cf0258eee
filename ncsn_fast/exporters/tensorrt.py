"""Export of a model's TensorRT engine to a file, for this user and this GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ncsn_fast import engines
from ncsn_fast.checkpoints.loading import resolve_model
from ncsn_fast.engines.tensorrt.engine import TrtEngine
from ncsn_fast.engines.tensorrt.options import parse_batch
from ncsn_fast.engines.tensorrt.plan_cache import write_plan
from ncsn_fast.models.score import ScoreModel

BATCH = "1:64:64"  # default shapes of the batch


@dataclasses.dataclass(frozen=True)
class ExportedPlan:
    """Result of an export.

    Attributes:
        shapes: shapes that the engine accepts.
        seconds: build time of TensorRT, possibly in an earlier call.
        error: largest relative error of f against PyTorch, over `levels` noise levels.
    """

    path: Path
    size: int
    dtype: str
    shapes: str
    error: float
    levels: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: TensorRT engine, {self.dtype}, {self.size / 1e6:.4g} MB, for "
            f"{self.shapes}, built in {self.seconds:.3g} s; f differs from PyTorch by at most "
            f"{self.error:.1e} at {self.levels} levels over the ladder. It runs for this user on "
            "this GPU and with these versions alone"
        )


def export_trt(
    model: str | Path | ScoreModel | None,
    path: str | Path,
    *,
    dtype: str = "fp16",
    batch: str | int = BATCH,
    size: str | None = None,
    workspace: float | None = None,
    builder_level: int = 3,
    refit: bool = False,
    device: str | torch.device | None = None,
    compile_cache: str | Path | None = None,
) -> ExportedPlan:
    """Builds a model's TensorRT engine, checks it, and writes it to a file.

    `Sampler(model, engine="trt", plan=path)` runs it. The file is signed with this user's key: a
    plan is native code, so files from elsewhere are not loaded.

    Args:
        model: anything that `ncsn_fast.load` accepts, or a ScoreModel; None as for Sampler.
        path: the file. It is replaced whole, or not at all.
        dtype: "fp16", "bf16", "tf32" or "fp32".
        batch: numbers of images, "least:usual:largest", or one.
        size: "H,W:H,W:H,W" or "H,W"; None for the model's.
        workspace, builder_level, refit: as for TrtEngine.
        compile_cache: folder of the engine cache, which may already hold it.

    Raises:
        EngineUnavailable: TensorRT or a GPU is missing.
        EngineError: TensorRT cannot build it, or it differs from PyTorch by more than
            precision.BOUNDS.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it, such as {path / 'm.plan'}")
    kind, place, _ = engines.pick("trt", device)
    assert issubclass(kind, TrtEngine)
    if dtype not in kind.dtypes:
        raise ValueError(f"dtype must be {', '.join(kind.dtypes)}; got {dtype!r}")
    engine = kind(
        resolve_model(model),
        device=place,
        dtype=dtype,
        batch_size=parse_batch(batch)[1],
        batch=batch,
        size=size,
        workspace=workspace,
        builder_level=builder_level,
        refit="on" if refit else "off",
        compile_cache=compile_cache,
    )
    content, facts, notes = engine.serialize()
    write_plan(path, content, facts, notes)
    seconds = float(notes.get("seconds", 0.0))
    return ExportedPlan(
        path, path.stat().st_size, dtype, str(engine.profile), engine.error, engine.levels, seconds
    )


__all__ = ["ExportedPlan", "export_trt"]
