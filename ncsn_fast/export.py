"""`python -m ncsn_fast.export`: a model's network as a file for other runtimes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from ncsn_fast import cli
from ncsn_fast.cli import UsageError
from ncsn_fast.engines.onnx_model import FIRST_OPSET, OPSETS
from ncsn_fast.onnx_export import export_onnx

OPEN = "dynamic"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The command line of `python -m ncsn_fast.export`."""

    out: Path
    """File to write."""
    model: str | None = None
    """Run folder, model folder, published .pth, or `digits` (the shipped model). Without it the
    newest run below ./runs, else the shipped model."""
    format: Literal["onnx"] = "onnx"
    """Format of the file."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of convolutions and what is between them; norms and resizing are float32 always."""
    batch: str = OPEN
    """Images in a batch, or dynamic."""
    size: str = OPEN
    """Height and width of the images (H,W), or dynamic."""
    opset: int | None = None
    """Version of the ONNX operators; without it 20, or 22 for bf16."""

    def __post_init__(self) -> None:
        if self.opset is not None:
            first = FIRST_OPSET[self.dtype]
            if not first <= self.opset <= OPSETS[-1]:
                raise ValueError(
                    f"--opset must be {first} to {OPSETS[-1]} for {self.dtype}; got {self.opset}"
                )
        _numbers("batch", self.batch, 1)
        _numbers("size", self.size, 2)


def _numbers(name: str, text: str, count: int) -> tuple[int, ...] | None:
    """The numbers of an option, or None for "dynamic"."""
    if text == OPEN:
        return None
    words = text.split(",")
    if len(words) != count or not all(word.isdecimal() and int(word) for word in words):
        form = ",".join(("H", "W")[:count]) if count > 1 else "a number"
        raise UsageError(f"--{name} must be {form} or {OPEN}; got {text!r}")
    return tuple(map(int, words))


def main(args: list[str] | None = None) -> int:
    """Command line; exit code 0."""
    options = cli.parse(ExportOptions, args, "ncsn_fast.export", "Write a network as a file.")
    batch, size = _numbers("batch", options.batch, 1), _numbers("size", options.size, 2)
    print(
        export_onnx(
            options.model,
            options.out,
            dtype=options.dtype,
            batch=None if batch is None else batch[0],
            size=None if size is None else (size[0], size[1]),
            opset=options.opset,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
