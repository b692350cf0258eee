"""Command `python -m ncsn_fast.export`: writes a model's network as a file for other runtimes."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("export"))

from ncsn_fast.cli.export_options import OPEN, ExportOptions, parse, parse_numbers
from ncsn_fast.cli.outputs import check_output
from ncsn_fast.engines.base import progress_shown
from ncsn_fast.exporters.onnx import export_onnx
from ncsn_fast.exporters.tensorrt import BATCH, export_trt


def run(options: ExportOptions) -> int:
    """Does what the options say; exit code 0."""
    command.single_process("ncsn_fast.export")
    check_output("--out", options.out.expanduser())
    print(_trt(options) if options.format == "trt" else _onnx(options))
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))


def _onnx(options: ExportOptions) -> object:
    batch, size = parse_numbers("batch", options.batch, 1), parse_numbers("size", options.size, 2)
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
