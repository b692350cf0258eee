"""Measures the peak memory of a provider in a fresh process, since the high-water mark never falls.

`python benchmarks/memory.py --provider ours-bf16 --workload cifar10-b8` prints it as JSON, in MB
(10^6 bytes) of resident memory:
    baseline_rss_mb   after importing torch and building the model
    build_rss_mb      peak while the provider was built, including its first forward
    peak_rss_mb       peak during three more forwards, after the model itself was released
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import providers
import torch
import workloads
from onnx_runtimes import onnx_file

FORWARDS = 3


def _resident(field: str) -> float:
    """Returns VmRSS (current) or VmHWM (peak) of this process, in MB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _reset_peak() -> None:
    """Frees unused memory and resets the high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure_here(provider: str, workload: str, *, small: bool = False) -> dict[str, float]:
    """Measures in this process, which must be a fresh one."""
    row = providers.PROVIDERS[provider]
    model, x = workloads.make(workloads.WORKLOADS[workload], small=small)
    if row.is_onnx:
        onnx_file(model, x)  # exports in another process, unless the file exists
    _reset_peak()
    baseline = _resident("VmRSS")
    run = row.build(model, x)
    run()
    build = _resident("VmHWM")
    del model, x
    _reset_peak()
    for _ in range(FORWARDS):
        run()
    peak = _resident("VmHWM")
    return {"baseline_rss_mb": baseline, "build_rss_mb": build, "peak_rss_mb": peak}


def measure(provider: str, workload: str, *, small: bool = False) -> dict[str, float]:
    """Measures in a new process, with as many threads as this one."""
    command: list[Any] = [sys.executable, __file__, "--provider", provider, "--workload", workload]
    command += ["--threads", str(torch.get_num_threads())] + ["--small"] * small
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {provider} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--provider", choices=providers.PROVIDERS, required=True)
    parser.add_argument("--workload", choices=workloads.WORKLOADS, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="a tiny network, for tests")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure_here(given.provider, given.workload, small=given.small)))


if __name__ == "__main__":
    main()
