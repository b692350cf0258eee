"""The type that the CPU engine computes in on this machine: timed once, then remembered."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import statistics
import time
from pathlib import Path

import torch

from ncsn_fast import files
from ncsn_fast.engines.cpu_plan import CpuPlan
from ncsn_fast.engines.graph import ConvolutionOf, Graph

log = logging.getLogger(__name__)
_GAIN = 1.1  # bfloat16 costs digits: it must be faster by more than the timer's noise
_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Choice:
    """`dtype` is "bf16" or "fp32"; `speedup` is how many times faster bf16 ran than fp32."""

    dtype: str
    speedup: float

    def __str__(self) -> str:
        return f"{self.dtype} (a convolution in bf16 runs {self.speedup:.2g}x as fast as in fp32)"


def cache_folder() -> Path:
    """Where measurements of this machine are kept: $XDG_CACHE_HOME or ~/.cache, ncsn_fast."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ncsn_fast"


@functools.cache
def fastest() -> Choice:
    """The faster type on this machine, from the cache or measured now (well under a second)."""
    path = cache_folder() / f"cpu-{_machine()}.json"
    try:
        values = json.loads(path.read_text())
        return _choice(float(values["speedup"]))
    except (OSError, ValueError, KeyError, TypeError):
        choice = _choice(_measure())
    try:
        with files.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(choice)))
    except OSError as error:
        log.info("%s cannot be written (%s): this machine is timed anew next time", path, error)
    return choice


def _choice(speedup: float) -> Choice:
    return Choice("bf16" if speedup >= _GAIN else "fp32", speedup)


def _measure() -> float:
    """Time in fp32 over time in bf16 of a convolution of these networks; medians, interleaved."""
    with torch.inference_mode():
        plans = {dtype: _convolution(dtype) for dtype in (torch.float32, torch.bfloat16)}
        seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in plans}
        for _ in range(_ROUNDS + 1):
            for dtype, plan in plans.items():
                began = time.perf_counter()
                plan.run()
                seconds[dtype].append(time.perf_counter() - began)
    fp32, bf16 = (statistics.median(times[1:]) for times in seconds.values())
    return fp32 / bf16


def _convolution(dtype: torch.dtype) -> CpuPlan:
    graph = Graph(128, 16, 16)
    weight = torch.zeros(128, 128, 3, 3)
    graph.output = graph.conv("conv", graph.input, ConvolutionOf(weight))
    return CpuPlan(graph, 4, dtype)


def _machine() -> str:
    """A name for what decides the answer: the processor and the torch."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([torch.__version__, *facts]).encode()).hexdigest()[:16]
