"""Machine facts that decide speed."""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any

import torch

QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
         "temperature.gpu", "clocks_event_reasons.active")  # fmt: skip


def facts(device: torch.device) -> dict[str, Any]:
    """Returns the device and the versions of the software on it."""
    found: dict[str, Any] = {
        "gpu": "none (a rehearsal on the CPU)",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / 2**20,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def state(device: torch.device) -> dict[str, str]:
    """Returns driver, clocks, power and temperature at this moment, as printed by nvidia-smi."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    values = done.stdout.splitlines()[device.index or 0].split(",")
    return dict(zip(QUERY, (value.strip() for value in values), strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
