"""Laps on a device: calls in a CUDA graph, synchronised at the end, on rotating inputs.

Launches from Python take longer than small kernels run, so all calls of a lap are captured in one
graph, which is replayed until a lap is long enough for the timer. Inputs rotate among copies that
exceed the L2 cache several times ("cold"), or stay the same ("warm").
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

LAP = 10e-3  # minimum seconds per lap
CALLS = 32  # minimum calls per graph: a replay itself costs some microseconds
COLD = 4  # size of the rotating inputs, in L2 caches
MOST_SETS = 512
CPU_CACHE = 1 << 11  # "L2 cache" of a rehearsal, which holds a tiny input

Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the L2 cache."""
    if device.type != "cuda":
        return CPU_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def sets_beyond_cache(set_bytes: int, device: torch.device) -> int:
    """Returns how many sets of inputs and outputs of this size exceed the L2 cache COLD times."""
    most = MOST_SETS if device.type == "cuda" else 2
    return min(most, max(1, -(-COLD * cache_bytes(device) // max(set_bytes, 1))))


def fits_cache(set_bytes: int, device: torch.device) -> bool:
    """Returns whether one set leaves half of the L2 cache free, so that it stays there."""
    return 2 * set_bytes <= cache_bytes(device)


def captured(calls: Sequence[Call], device: torch.device) -> Call:
    """Captures all calls as one: in a CUDA graph, or in a loop on a CPU."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in [calls[0], calls[0], *calls]:  # compiles, and chooses cuDNN's algorithms
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


@dataclasses.dataclass(frozen=True)
class Lap:
    """Timed lap.

    Attributes:
        once: the captured calls.   repeats: how often they run before synchronisation.
        calls: kept for their tensors, which a graph uses without owning them.
    """

    once: Call
    repeats: int
    calls: Sequence[Call]
    device: torch.device

    def __call__(self) -> None:
        for _ in range(self.repeats):
            self.once()
        synchronize(self.device)


def lap_of(calls: Sequence[Call], device: torch.device, shortest: float) -> tuple[Lap, int]:
    """Returns (lap, n): a lap of n calls, the given ones in turn.

    It takes at least `shortest` seconds.
    """
    turns = -(-CALLS // len(calls)) if device.type == "cuda" else 1
    once = captured(list(itertools.chain(*[calls] * turns)), device)
    repeats = _repeats(once, device, shortest)
    return Lap(once, repeats, calls, device), repeats * turns * len(calls)


def _repeats(once: Call, device: torch.device, shortest: float) -> int:
    """Returns how often `once` must run for `shortest` seconds, found by doubling."""
    n = 1
    while True:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(n):
            once()
        synchronize(device)
        seconds = time.perf_counter() - began
        if seconds >= shortest / 2 or n >= 1 << 16:
            return max(1, round(n * shortest / max(seconds, 1e-9)))
        n *= 2
