"""Facts of the machine, written into every benchmark's JSON."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ncsn_fast import ops


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Adds what decides speed: processor, threads, versions, dispatch level."""
    machine_info["ncsn_fast"] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": ops.available()["isa_default"],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
