"""Options of `python -m ncsn_fast.convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ncsn_fast.cli import command


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Command-line options of `python -m ncsn_fast.convert`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Published .pth or .pkl, run folder, model folder, folder of diffusers, or OWNER/NAME of one
    on the Hugging Face Hub."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Model folder to write."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, where there are any, or the raw ones."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the stored weights; loading gives float32 whatever it is."""
    run: str | None = None
    """Published run that a .pth of score_sde is like, such as vp_cifar10_ddpmpp: it says the SDE,
    the noise levels and the image size."""
    image_size: int | None = None
    """Image height and width: a .pth does not hold it."""
    n_sigmas: int | None = None
    """Number of noise levels: files of continuous models do not hold it."""
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
        """Returns what was given of what files do not hold."""
        others = ("source", "folder", "weights", "dtype")
        given = {k: v for k, v in vars(self).items() if k not in others and v is not None}
        if self.image_size is not None:
            given["image_size"] = (self.image_size, self.image_size)
        return given


def parse(args: list[str] | None) -> ConvertOptions:
    """Parses the command line; UsageError if it is invalid."""
    return command.parse(ConvertOptions, args, "ncsn_fast.convert", "Write a model folder.")
