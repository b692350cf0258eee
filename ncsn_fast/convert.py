"""Command `python -m ncsn_fast.convert SOURCE FOLDER`: any model -> a model folder."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("convert"))

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ncsn_fast.checkpoints import model_folder, training_run
from ncsn_fast.checkpoints.loading import load
from ncsn_fast.cli.outputs import check_output_folder
from ncsn_fast.models.score import ModelConfig

_STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Command-line options of `python -m ncsn_fast.convert`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Published .pth, run folder or model folder."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Model folder to write."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, where there are any, or the raw ones."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the stored weights; loading gives float32 whatever it is."""
    image_size: int | None = None
    """Image height and width: a .pth does not hold it."""
    epsilon: float | None = None
    """Langevin step size: a .pth does not hold it."""
    n_steps_each: int | None = None
    """Langevin steps per level: a .pth does not hold it."""
    sigma_begin: float | None = None
    """Largest sigma: a .pth of NCSN (2019) does not hold it."""
    sigma_end: float | None = None
    """Smallest sigma: a .pth of NCSN (2019) does not hold it."""
    sigma_min: float | None = None
    """Smallest sigma(t) of the tutorial's network: its .pth does not hold it."""
    sigma_max: float | None = None
    """Largest sigma(t) of the tutorial's network: its .pth does not hold it."""
    langevin_form: Literal["code", "paper"] | None = None
    """Langevin step: code (as published code runs) or paper (half that alpha)."""
    act: Literal["elu", "relu", "lrelu", "swish"] | None = None
    """Activation: a .pth does not hold it; published NCSN models use elu."""
    scale_input: bool | None = None
    """False for models trained on `rescaled` or logit-transformed data."""

    def overrides(self) -> dict[str, Any]:
        """Returns the fields of ModelConfig that were given."""
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        given = {k: v for k, v in vars(self).items() if k in names and v is not None}
        if self.image_size is not None:
            given["image_size"] = (self.image_size, self.image_size)
        return given


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    options = command.parse(ConvertOptions, args, "ncsn_fast.convert", "Write a model folder.")
    command.single_process("ncsn_fast.convert")
    if training_run.is_run(options.folder):
        raise ValueError(f"{options.folder} is a training run; write the model folder elsewhere")
    check_output_folder("FOLDER", options.folder)
    model = load(options.source, weights=options.weights, **options.overrides())
    model_folder.save_model(model, options.folder, dtype=_STORED[options.dtype])
    print(f"{options.folder}: {model_folder.CONFIG_NAME}, {model_folder.WEIGHTS_NAME}")
    return 0
