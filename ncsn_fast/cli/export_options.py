"""Options of `python -m ncsn_fast.export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ncsn_fast.cli import command
from ncsn_fast.cli.command import UsageError

OPEN = "dynamic"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Command-line options of `python -m ncsn_fast.export`."""

    out: Path
    """File to write."""
    model: str | None = None
    """Run folder, model folder, published .pth or .pkl, folder of diffusers, OWNER/NAME of one on
    the Hugging Face Hub, or the name of a model that ships, such as `digits`. Without it the newest
    run below ./runs, else the digits."""
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
            from ncsn_fast.engines.onnx.model import FIRST_OPSET, OPSETS

            kind = self.dtype or "fp32"
            if not FIRST_OPSET[kind] <= self.opset <= OPSETS[-1]:
                raise ValueError(
                    f"--opset must be {FIRST_OPSET[kind]} to {OPSETS[-1]} for {kind}; "
                    f"got {self.opset}"
                )
        parse_numbers("batch", self.batch, 1)
        parse_numbers("size", self.size, 2)

    def _check_trt(self) -> None:
        if self.opset is not None:
            raise UsageError("--opset is for --format onnx")
        from ncsn_fast.engines.tensorrt.options import parse_batch, parse_size, parse_workspace

        if self.batch != OPEN:
            parse_batch(self.batch)
        if self.size != OPEN:
            parse_size(self.size)
        if self.workspace is not None:
            parse_workspace(self.workspace)


def parse_numbers(name: str, text: str, count: int) -> tuple[int, ...] | None:
    """Parses the numbers of an option; None for "dynamic"."""
    if text == OPEN:
        return None
    words = text.split(",")
    if len(words) != count or not all(word.isdecimal() and int(word) for word in words):
        form = ",".join(("H", "W")[:count]) if count > 1 else "a number"
        raise UsageError(f"--{name} must be {form} or {OPEN}; got {text!r}")
    return tuple(map(int, words))


def parse(args: list[str] | None) -> ExportOptions:
    """Parses the command line; UsageError if it is invalid."""
    return command.parse(ExportOptions, args, "ncsn_fast.export", "Write a network as a file.")
