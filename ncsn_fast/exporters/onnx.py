"""Export of a network as an ONNX file, compared with PyTorch."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from ncsn_fast.checkpoints.loading import resolve_model
from ncsn_fast.data.files import atomic_write
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.engines.base import EngineUnavailable
from ncsn_fast.engines.onnx.engine import OrtEngine
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.engines.precision import BOUNDS
from ncsn_fast.models.score import ModelConfig, ScoreModel

_BATCH = 4  # images per batch in the check, if the file leaves N dynamic


@dataclasses.dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        error: largest relative error of f against PyTorch over the noise levels; None for bf16,
            which ONNX Runtime does not run on a CPU: the graph is checked, its numbers are not.
        levels: number of noise levels compared, evenly spread.
    """

    path: Path
    size: int
    dtype: str
    error: float | None
    levels: int

    def __str__(self) -> str:
        written = f"{self.path}: {self.dtype}, {self.size / 1e6:.4g} MB, checked by onnx.checker; "
        if self.error is None:
            return written + "its numbers were not run: ONNX Runtime has no bfloat16 on CPUs"
        half = " (which rounds weights, but computes in float32)" if self.dtype == "fp16" else ""
        return written + (
            f"in ONNX Runtime on the CPU{half}, f differs from PyTorch by at most {self.error:.1e} "
            f"at {self.levels} levels over the ladder (allowed: {BOUNDS[self.dtype]:.0e})"
        )


def export_onnx(
    model: str | Path | ScoreModel | None,
    path: str | Path,
    *,
    dtype: str = "fp32",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    opset: int | None = None,
) -> Exported:
    """Exports the raw output f of a model's network as an ONNX file, after checking it.

    score = f / sigma; score = f for NCSN (2019). Inputs are "x" (N, C, H, W) float32, data plus
    noise; for networks conditioned on it the noise level "sigma" (N,) float32, of which the
    graph computes time or level (NCSN's is the trained one nearest in log sigma); for those with
    classes "labels" (N,) int64, where the number of classes means no class. The output is "f"
    float32.

    Args:
        model: anything that `ncsn_fast.load` accepts, or a ScoreModel; None as for Sampler.
        path: the file. It is replaced whole, or not at all.
        dtype: "fp32", "fp16" or "bf16" for convolutions and the maps between them; norms and
            bilinear resizing are always float32.
        batch: N; None for dynamic.   size: (H, W); None for dynamic.
        opset: 20 to 23 (bf16: from 22); None for the oldest that supports the dtype.

    Raises:
        EngineUnavailable: onnx or onnxruntime is missing.
        EngineError: ONNX Runtime's f differs from PyTorch's by more than precision.BOUNDS.
        ValueError: invalid dtype, shape or opset, or the weights exceed 2 GB.
    """
    model, path = resolve_model(model), Path(path).expanduser()
    problem = OrtEngine.unavailable()
    if problem is not None:
        raise EngineUnavailable(f"cannot export to ONNX: {problem}")
    content = make_onnx(model, dtype=dtype, batch=batch, size=size, opset=opset)
    error, levels = None, 0
    if dtype in OrtEngine.dtypes:
        probed = copy.copy(model)
        if isinstance(model.config, ModelConfig) and size is not None:
            probed.config = dataclasses.replace(model.config, image_size=size)
        engine = OrtEngine(
            probed, onnx=content, dtype=dtype, batch_size=batch or _BATCH,
            device=torch.device("cpu"),
        )  # fmt: skip
        error, levels = engine.error, engine.levels
    write_or_keep(path, lambda place: _write(place, content))
    return Exported(path, len(content), dtype, error, levels)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


__all__ = ["Exported", "export_onnx"]
