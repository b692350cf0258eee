"""Command `python -m ncsn_fast.doctor`: what runs on this machine, and what the rest would need."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("doctor"))

import importlib.metadata
import platform

import torch

import ncsn_fast
from ncsn_fast import engines, ops
from ncsn_fast.cli.doctor_options import DoctorOptions, parse
from ncsn_fast.engines.cpu import autotune
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache

# Distributions that provide engines; at most one of the two onnxruntime ones is installed.
PACKAGES = ("triton", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_cu13")


def facts() -> list[tuple[str, str]]:
    """Returns name and value of everything that decides which engine runs, and how fast."""
    rows = [
        ("ncsn_fast", ncsn_fast.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("threads", str(torch.get_num_threads())),
        ("torch CPU level", torch.backends.cpu.get_cpu_capability()),
    ]
    rows += [(f"extension {name}", str(value)) for name, value in ops.available().items()]
    rows += [(name, _version(name)) for name in PACKAGES]
    cuda = torch.version.cuda or "none: this build of torch is for CPUs"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [("GPUs", ", ".join(gpus) or "none that torch can use"), ("CUDA of torch", cuda)]
    rows.append(("driver", trt_api.driver()))
    return [*rows, ("compiled engines", _compiled())]


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


def run(options: DoctorOptions) -> int:
    """Does what the options say; exit code 0."""
    for name, value in facts():
        print(f"{name:24} {value}")
    print("\nengine    runs   what it is, and what is missing")
    for row in engines.availability():
        print(f"{row.name:9} {'no ' if row.problem else 'yes'}    {row.summary}")
        if row.problem:
            print(f"{'':17}{row.problem}")
    print()
    if engines.ENGINES["cpu"].unavailable() is None:
        choice, threads = autotune.fastest(measure=options.measure), torch.get_num_threads()
        print(f"engine 'cpu' on {threads} threads computes in {choice};")
        print("dtype= and NCSN_FAST_CONVOLUTIONS=direct or winograd choose otherwise")
    kind, device, reason = engines.pick("auto", None)
    print(f"engine='auto' is {kind.name!r} on {device}: {reason}")
    return 0


def main(args: list[str] | None = None) -> int:
    """Runs the command; exit code 0."""
    return run(parse(args))
