"""Command `python -m ncsn_fast.convert SOURCE FOLDER`: any model -> a model folder."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("convert"))

import torch

from ncsn_fast.checkpoints import model_folder, training_run
from ncsn_fast.checkpoints.loading import load
from ncsn_fast.cli.convert_options import ConvertOptions, parse
from ncsn_fast.cli.outputs import check_output_folder

_STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(options: ConvertOptions) -> int:
    """Does what the options say; exit code 0."""
    command.single_process("ncsn_fast.convert")
    if training_run.is_run(options.folder):
        raise ValueError(f"{options.folder} is a training run; write the model folder elsewhere")
    check_output_folder("FOLDER", options.folder)
    model = load(options.source, weights=options.weights, **options.overrides())
    model_folder.save_model(model, options.folder, dtype=_STORED[options.dtype])
    print(f"{options.folder}: {model_folder.CONFIG_NAME}, {model_folder.WEIGHTS_NAME}")
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
