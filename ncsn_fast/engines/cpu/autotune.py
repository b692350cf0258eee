"""Autotuning of the CPU engine: times its alternatives once per machine and caches the result.

Two choices are timed: the dtype of feature maps, and for 3x3 convolutions oneDNN's direct algorithm
or our Winograd convolution (csrc/include/ncsn_fast/winograd.h). Which is faster depends on the
processor: bfloat16 needs AMX or AVX-512-BF16; Winograd needs a quarter of the multiplications and
multiplies bfloat16 maps in 16-bit fixed point, which every processor supports.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import statistics
import time
from pathlib import Path

import torch

from ncsn_fast.data import files
from ncsn_fast.engines.base import DTYPES
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph

log = logging.getLogger(__name__)
ALGORITHMS = ("direct", "winograd")
_GAIN = 1.1  # required speedup over the default, above the noise of the timer
_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Choice:
    """Speeds of a typical convolution in each variant, relative to direct fp32.

    A variant is a dtype that this machine supports and an algorithm, such as "bf16 winograd".
    """

    speed: dict[str, float]

    def algorithm(self, dtype: str) -> str:
        """Returns the faster algorithm for 3x3 convolutions in this dtype."""
        gain = self.speed[f"{dtype} winograd"] / self.speed[f"{dtype} direct"]
        return "winograd" if gain >= _GAIN else "direct"

    def algorithms(self, dtype: str) -> tuple[str, ...]:
        """That, and the direct one after it where it is another."""
        return tuple(dict.fromkeys((self.algorithm(dtype), "direct")))

    @property
    def dtype(self) -> str:
        """The faster dtype, each with its better algorithm."""
        if "bf16 direct" not in self.speed:
            return "fp32"
        fp32, bf16 = (self.speed[f"{dtype} {self.algorithm(dtype)}"] for dtype in ("fp32", "bf16"))
        return "bf16" if bf16 / fp32 >= _GAIN else "fp32"

    def __str__(self) -> str:
        ways = ", ".join(f"{way} {speed:.2g}x" for way, speed in self.speed.items())
        return f"{self.dtype}, 3x3 convolutions {self.algorithm(self.dtype)} (measured: {ways})"


@functools.cache
def fastest() -> Choice:
    """Returns the choice for this machine, from the cache or timed now (well under a second)."""
    path = files.cache_folder() / f"cpu-{_machine()}.json"
    try:
        known = json.loads(path.read_text())
        return Choice({f"{d} {a}": float(known[f"{d} {a}"]) for d, a in _variants()})
    except (OSError, ValueError, KeyError, TypeError):
        choice = Choice(_measure())
    try:
        with files.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(choice.speed))
    except OSError as error:
        log.info("%s; this machine is timed anew next time", error)
    return choice


def _variants() -> list[tuple[str, str]]:
    """Returns the dtypes that this machine supports, fp32 first, each with every algorithm."""
    types = [dtype for dtype in ("fp32", "bf16") if onednn.lacks(dtype) is None]
    return [(dtype, algorithm) for dtype in types for algorithm in ALGORITHMS]


def _measure() -> dict[str, float]:
    """Returns speeds relative to the first variant: medians of interleaved rounds."""
    seconds: dict[str, list[float]] = {}
    with torch.inference_mode():
        plans = {f"{d} {a}": _convolution(DTYPES[d], a == "winograd") for d, a in _variants()}
        for _ in range(_ROUNDS + 1):
            for way, plan in plans.items():
                began = time.perf_counter()
                plan.run()
                seconds.setdefault(way, []).append(time.perf_counter() - began)
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    first = next(iter(medians.values()))
    return {way: first / median for way, median in medians.items()}


def _convolution(dtype: torch.dtype, winograd: bool) -> CpuPlan:
    graph = Graph(128, 16, 16)
    weight = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    graph.output = graph.conv("conv", graph.input, ConvolutionSpec(weight))
    return CpuPlan(graph, 4, dtype, winograd=winograd)


def _machine() -> str:
    """Returns a hash of what decides the choice: the processor and the version of torch."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([torch.__version__, *facts]).encode()).hexdigest()[:16]
