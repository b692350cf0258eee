"""Command `python -m ncsn_fast.export`: writes a model's network as a file for other runtimes."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("export"))

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ncsn_fast.cli.command import UsageError
from ncsn_fast.cli.outputs import check_output
from ncsn_fast.engines.base import progress_shown
from ncsn_fast.engines.onnx.model import FIRST_OPSET, OPSETS
from ncsn_fast.engines.tensorrt.options import parse_batch, parse_size, parse_workspace
from ncsn_fast.exporters.onnx import export_onnx
from ncsn_fast.exporters.tensorrt import BATCH, export_trt

OPEN = "dynamic"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Command-line options of `python -m ncsn_fast.export`."""

    out: Path
    """File to write."""
    model: str | None = None
    """Run folder, model folder, published .pth, or `digits` (the shipped model). Without it the
    newest run below ./runs, else the shipped model."""
    format: Literal["onnx", "trt"] = "onnx"
    """onnx: for any runtime; trt: a TensorRT engine for this GPU, this user and these versions."""
    dtype: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """Dtype of convolutions and the maps between them; norms and resizing are always float32.
    Without it fp32 for onnx, fp16 for trt (which has tf32, too)."""
    batch: str = OPEN
    """Images in a batch, or dynamic. trt: least:usual:largest; dynamic is 1:64:64."""
    size: str = OPEN
    """Height and width of the images (H,W), or dynamic. trt: also least:usual:largest of those;
    dynamic is the model's own."""
    opset: int | None = None
    """Version of the ONNX operators (onnx); without it 20, or 22 for bf16."""
    workspace: float | None = None
    """GB that a layer may use beside its maps (trt); without it all there is."""
    builder_level: Literal[0, 1, 2, 3, 4, 5] | None = None
    """How long TensorRT searches for faster kernels (trt; default 3)."""
    refit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Build an engine whose weights can be replaced, for all models of this structure (trt)."""
    device: str | None = None
    """cuda or cuda:N, the GPU to build for (trt)."""
    compile_cache: Path | None = None
    """Folder of the engine cache (trt); without it one below ~/.cache."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress bar (trt)."""

    def __post_init__(self) -> None:
        if self.format == "trt":
            self._check_trt()
        else:
            self._check_onnx()

    def _check_onnx(self) -> None:
        names = ("workspace", "builder_level", "refit", "device", "compile_cache", "quiet")
        for name, value in ((name, getattr(self, name)) for name in names):
            if value not in (None, False):
                raise UsageError(f"--{name.replace('_', '-')} is for --format trt")
        if self.dtype == "tf32":
            raise UsageError("--dtype tf32 is for --format trt; ONNX files have no such type")
        if self.opset is not None:
            kind = self.dtype or "fp32"
            if not FIRST_OPSET[kind] <= self.opset <= OPSETS[-1]:
                raise ValueError(
                    f"--opset must be {FIRST_OPSET[kind]} to {OPSETS[-1]} for {kind}; "
                    f"got {self.opset}"
                )
        _numbers("batch", self.batch, 1)
        _numbers("size", self.size, 2)

    def _check_trt(self) -> None:
        if self.opset is not None:
            raise UsageError("--opset is for --format onnx")
        if self.batch != OPEN:
            parse_batch(self.batch)
        if self.size != OPEN:
            parse_size(self.size)
        if self.workspace is not None:
            parse_workspace(self.workspace)


def _numbers(name: str, text: str, count: int) -> tuple[int, ...] | None:
    """Parses the numbers of an option; None for "dynamic"."""
    if text == OPEN:
        return None
    words = text.split(",")
    if len(words) != count or not all(word.isdecimal() and int(word) for word in words):
        form = ",".join(("H", "W")[:count]) if count > 1 else "a number"
        raise UsageError(f"--{name} must be {form} or {OPEN}; got {text!r}")
    return tuple(map(int, words))


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    options = command.parse(ExportOptions, args, "ncsn_fast.export", "Write a network as a file.")
    command.single_process("ncsn_fast.export")
    check_output("--out", options.out.expanduser())
    print(_trt(options) if options.format == "trt" else _onnx(options))
    return 0


def _onnx(options: ExportOptions) -> object:
    batch, size = _numbers("batch", options.batch, 1), _numbers("size", options.size, 2)
    return export_onnx(
        options.model,
        options.out,
        dtype=options.dtype or "fp32",
        batch=None if batch is None else batch[0],
        size=None if size is None else (size[0], size[1]),
        opset=options.opset,
    )


def _trt(options: ExportOptions) -> object:
    progress_shown.set(not options.quiet)
    return export_trt(
        options.model,
        options.out,
        dtype=options.dtype or "fp16",
        batch=BATCH if options.batch == OPEN else options.batch,
        size=None if options.size == OPEN else options.size,
        workspace=options.workspace,
        builder_level=3 if options.builder_level is None else options.builder_level,
        refit=options.refit,
        device=options.device,
        compile_cache=options.compile_cache,
    )
