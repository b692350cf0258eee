"""Options of `python -m ncsn_fast.doctor`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from ncsn_fast.cli import command


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Command-line options of `python -m ncsn_fast.doctor`."""

    measure: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure again which dtype and algorithm the CPU engine should take, and remember it."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all of it as JSON, for a report of a fault. It holds no names of users or machines."""


def parse(args: list[str] | None) -> DoctorOptions:
    """Parses the command line; UsageError if it is invalid."""
    return command.parse(DoctorOptions, args, "ncsn_fast.doctor", "What runs on this machine.")
