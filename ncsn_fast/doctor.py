"""Command `python -m ncsn_fast.doctor`: what runs on this machine, and what the rest would need."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("doctor"))

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import ncsn_fast
from ncsn_fast import engines, ops
from ncsn_fast.cli.doctor_options import DoctorOptions, parse
from ncsn_fast.engines.cpu import autotune
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache

# Distributions that provide engines; at most one of the two onnxruntime ones is installed.
PACKAGES = ("triton", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_cu13")


def facts() -> dict[str, Any]:
    """Returns everything that decides which engine runs, and how fast, by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ncsn_fast": ncsn_fast.__version__,
        "system": f"{platform.system()} {platform.machine()}, {platform.libc_ver()[1] or 'libc ?'}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "torch CPU level": torch.backends.cpu.get_cpu_capability(),
        **{f"extension {name}": value for name, value in ops.available().items()},
        **{name: _version(name) for name in PACKAGES},
        "GPUs": ", ".join(gpus) or "none that torch can use",
        "CUDA of torch": torch.version.cuda or "none: this build of torch is for CPUs",
        "driver": trt_api.driver(),
        "compiled engines": _compiled(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiled() -> str:
    """Describes the cache of compiled engines: number, folder and size."""
    try:
        folder = PlanCache().folder
        sizes = [path.stat().st_size for path in folder.glob("*.plan")]
    except (ValueError, OSError) as error:  # a limit that is none; a folder that cannot be read
        return str(error)
    return f"{len(sizes)} in {folder}, {sum(sizes) / 1e6:.4g} MB"


def choices(options: DoctorOptions) -> dict[str, str]:
    """Returns what the cpu engine computes in, where it runs, and what engine="auto" is."""
    found = {}
    if engines.ENGINES["cpu"].unavailable() is None:
        choice, threads = autotune.fastest(measure=options.measure), torch.get_num_threads()
        found["cpu"] = (
            f"engine 'cpu' on {threads} threads computes in {choice};\n"
            f"dtype= and NCSN_FAST_CONVOLUTIONS={'|'.join(autotune.ALGORITHMS)} choose otherwise"
        )
    kind, device, reason = engines.pick("auto", None)
    found["auto"] = f"engine='auto' is {kind.name!r} on {device}: {reason}"
    return found


def advice(rows: list[engines.Availability]) -> list[str]:
    """Returns what a reader can do next: commands, and what would make more engines run."""
    steps = [
        "draw samples: python -m ncsn_fast.sample --n 64 --method fast --out grid.png",
        "train on images: python -m ncsn_fast.train --data FOLDER --channels 3 --dry-run",
    ]
    if not torch.cuda.is_available() and trt_api.driver() != "unknown":
        why = "has no CUDA" if torch.version.cuda is None else "sees no GPU"
        steps.append(
            f"use the GPU: its driver is here, but torch {torch.__version__} {why}; install the "
            "build of torch for CUDA that pytorch.org names for this driver"
        )
    elif not torch.cuda.is_available():
        steps.append("nothing to install for engines 'cuda' and 'trt': they need an NVIDIA GPU")
    steps += [
        f"for engine {row.name!r}: {row.problem}"
        for row in rows
        if row.problem and (row.name not in ("cuda", "trt") or torch.cuda.is_available())
    ]
    return [*steps, "report a fault: add the output of python -m ncsn_fast.doctor --json"]


def run(options: DoctorOptions) -> int:
    """Does what the options say; exit code 0."""
    machine, rows = facts(), engines.availability()
    chosen, steps = choices(options), advice(rows)
    if options.json:
        print(json.dumps(_report(machine, rows, chosen, steps), indent=1, ensure_ascii=False))
        return 0
    print("This machine\n")
    for name, value in machine.items():
        print(f"{name:24} {value}")
    print("\nEngines\n\nengine    runs   what it is, and what is missing")
    for row in rows:
        print(f"{row.name:9} {'no ' if row.problem else 'yes'}    {row.summary}")
        if row.problem:
            print(f"{'':17}{row.problem}")
    print("", *chosen.values(), sep="\n")
    print("\nWhat to do next\n")
    for step in steps:
        print(f"- {step}")
    return 0


def _report(
    machine: dict[str, Any],
    rows: list[engines.Availability],
    chosen: dict[str, str],
    steps: list[str],
) -> dict[str, Any]:
    """Returns the three parts for JSON; the home folder, which names the user, is written ~."""
    home = str(Path.home())
    report = {
        "machine": machine,
        "engines": {row.name: {"runs": not row.problem, "problem": row.problem} for row in rows},
        "choices": chosen,
        "next": steps,
    }
    text: dict[str, Any] = json.loads(json.dumps(report, default=str).replace(home, "~"))
    return text


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
