"""Options of `python -m ncsn_fast.train`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Annotated

import tyro

from ncsn_fast.cli import command
from ncsn_fast.models.architectures import TIME_ARCHS
from ncsn_fast.models.unet_architectures import UNETS
from ncsn_fast.names import suggestion
from ncsn_fast.training.configs import CONFIGS, ToyOptions, TrainConfig

_NAMES = ", ".join([*CONFIGS, "toy"])
_CONFIG_HELP = f"Settings to start from, which the options override: {_NAMES} (options of its own)."


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Command-line options of `python -m ncsn_fast.train`."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config_name: Annotated[str, tyro.conf.arg(name="config", metavar="NAME", help=_CONFIG_HELP)] = (
        "digits"
    )
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue <runs>/<name> from its newest checkpoint; start it if it has none."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read the data (some of it, if it takes more than 2 GiB), print the resolved configuration as
    JSON and what the run would do, and stop."""


def parse(args: list[str] | None) -> TrainOptions | ToyOptions:
    """Parses the options; `--config NAME` selects the row of CONFIGS with the defaults.

    Raises:
        UsageError: the command line is invalid.
    """
    args = sys.argv[1:] if args is None else args
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", default="digits")
    try:
        name = first.parse_known_args(args)[0].config
    except argparse.ArgumentError as error:
        raise command.UsageError(f"{error}; it must be one of {_NAMES}") from error
    if name == "toy":
        about = "Train on the 2-D mixture of NCSN (2019), draw fields and samples into runs/toy."
        return command.parse(ToyOptions, args, "ncsn_fast.train", about)
    if name not in CONFIGS:
        near = suggestion(name, (*CONFIGS, "toy"))
        raise command.UsageError(f"--config must be one of {_NAMES}; got {name!r}{near}")
    default = TrainOptions(config=CONFIGS[name], config_name=name)
    description = (
        "Train a score model. With no options: the digits configuration, into runs/digits."
    )
    options = command.parse(TrainOptions, args, "ncsn_fast.train", description, default)
    known = options.config.arch in (*TIME_ARCHS, *UNETS)
    derives = options.config.class_cond or (options.config.sigma_begin <= 0 and not known)
    if not options.config.data and (derives or not options.dry_run):
        raise command.UsageError(
            f"--config {name} needs images: --data with a folder, a file or hf:NAME"
        )
    return options
