"""Runs one section of the GPU benchmarks in this process and writes its record.

`python benchmarks/measure_gpu.py SECTION --out FILE`; tools/gpu_session.py runs all of them, each
in its own process, so that none can break or delay another. `--device cpu --small` is a rehearsal.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gpu import ceilings, convolutions, kernels, machine, steps, unets
from gpu.section import Section

SECTIONS: dict[str, Callable[[Section], None]] = {
    "ceilings": ceilings.measure,
    "step-b256": functools.partial(
        steps.measure, batch=256, seconds=15.0,
        names=[*steps.PUBLISHED, *(name for name in steps.OURS if not name.endswith("step"))],
    ),
    "step-b1": functools.partial(
        steps.measure, batch=1, seconds=8.0, names=[*steps.PUBLISHED, *steps.OURS]
    ),
    "norms": kernels.norms,
    "group-norms": kernels.group_norms,
    "updates": kernels.updates,
    "unet-b16": functools.partial(unets.measure, batch=16, seconds=5.0),
    "convolutions": convolutions.measure,
    "step-b16": functools.partial(
        steps.measure, batch=16, seconds=5.0, names=[*steps.PUBLISHED, *steps.LEVEL]
    ),
    "compiled-b256": functools.partial(
        steps.measure, batch=256, seconds=6.0, against="compiled",
        names=["eager-bf16", "inductor-bf16", *steps.LEVEL],
    ),
    "compiled-b1": functools.partial(
        steps.measure, batch=1, seconds=4.0, against="compiled",
        names=["eager-bf16", "inductor-graphs-bf16", *steps.LEVEL],
    ),
    "runtimes-b256": functools.partial(
        steps.measure, batch=256, seconds=6.0, against="runtimes",
        names=["eager-bf16", *steps.RUNTIMES, *steps.LEVEL],
    ),
    "runtimes-b1": functools.partial(
        steps.measure, batch=1, seconds=4.0, against="runtimes",
        names=["eager-bf16", *steps.RUNTIMES, *steps.LEVEL],
    ),
}  # fmt: skip


def main() -> int:
    """Runs the section; exit code 1 if one of this package's providers is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=600.0, help="build nothing after these")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.benchmark = True  # as in the released code; shapes are static
    torch.manual_seed(0)
    section = Section(
        arguments.section, device, arguments.out, small=arguments.small, seconds=arguments.seconds
    )
    section.record |= {"machine": machine.facts(device), "before": machine.state(device)}
    SECTIONS[arguments.section](section)
    section.record["after"] = machine.state(device)
    section.save()
    for row in section.record["not_run"]:
        print(f"{row['group']}: {row['provider']}: {row['reason']}")
    return int(section.failed)


if __name__ == "__main__":
    sys.exit(main())
