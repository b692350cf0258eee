"""Laps on a device: calls in a CUDA graph, synchronised at the end, on inputs that rotate.

Launches from Python take longer than small kernels run. All calls of a lap are therefore captured
in one graph, which is replayed until a lap is long enough for the clock. Inputs rotate among copies
that exceed the L2 cache several times ("cold"), or stay one set ("warm").
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

LAP = 10e-3  # seconds that a lap shall hold at least
CALLS = 32  # in a graph at least: replaying it costs some microseconds itself
COLD = 4  # times the L2 cache is exceeded by inputs that rotate
MOST_SETS = 512
CPU_CACHE = 1 << 11  # a rehearsal's "L2 cache": a tiny input fits

Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    if device.type != "cuda":
        return CPU_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def sets_beyond_cache(set_bytes: int, device: torch.device) -> int:
    """How many copies of inputs and outputs of that size exceed the L2 cache COLD times."""
    most = MOST_SETS if device.type == "cuda" else 2
    return min(most, max(1, -(-COLD * cache_bytes(device) // max(set_bytes, 1))))


def fits_cache(set_bytes: int, device: torch.device) -> bool:
    """Whether one set leaves half of the L2 cache free, so that it stays there."""
    return 2 * set_bytes <= cache_bytes(device)


def captured(calls: Sequence[Call], device: torch.device) -> Call:
    """All the calls as one: a CUDA graph of them, on a CPU a loop."""
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
    """A lap to be timed.

    Attributes:
        once: the calls, captured.   repeats: how often they run before the wait for the device.
        calls: held for their tensors, which a graph uses without owning them.
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
    """(lap, n): the lap makes n calls, the given ones in turn, in at least `shortest` seconds."""
    turns = -(-CALLS // len(calls)) if device.type == "cuda" else 1
    once = captured(list(itertools.chain(*[calls] * turns)), device)
    repeats = _repeats(once, device, shortest)
    return Lap(once, repeats, calls, device), repeats * turns * len(calls)


def _repeats(once: Call, device: torch.device, shortest: float) -> int:
    """How often `once` must run for a lap of `shortest` seconds; found by doubling."""
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
