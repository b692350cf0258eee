"""Repeats a step through CUDA graphs, each captured once and replayed ever after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch

_CAPTURING = threading.Lock()  # a capture tolerates no other one in its process


Call = Callable[[], object]


class Graphs:
    """Graphs of one and of several calls of a step, captured when they are first needed.

    On the CPU, where there are no graphs, and without `captures`, the calls are made one by one.
    """

    def __init__(self, device: torch.device, *, captures: bool) -> None:
        self.device = device
        self.captures = captures and device.type == "cuda"
        self._replays: dict[tuple[Hashable, int], Call] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        # Of this device: torch's own capture stream is on the device of the process's first.
        self._stream = torch.cuda.Stream(device) if self.captures else None

    def __len__(self) -> int:
        return len(self._replays)

    def repeat(self, key: Hashable, calls: int, step: Call, warm_up: Call) -> None:
        """Makes so many calls of a step.

        Args:
            key: what the step depends on; equal keys mean the same step.
            warm_up: one call of the step that leaves no trace. It comes before a capture, because
                kernels are compiled and algorithms picked in the first call, and no capture may
                contain that.
        """
        if (key, calls) not in self._replays:
            self._replays[key, calls] = self._capture(calls, step, warm_up)
        self._replays[key, calls]()

    def _capture(self, calls: int, step: Call, warm_up: Call) -> Call:
        def run() -> None:
            for _ in range(calls):
                step()

        if self._stream is None:
            return run
        side, current = self._stream, torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate and copy while this one captures.
        with _CAPTURING:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                warm_up()
            current.wait_stream(side)
            with torch.cuda.graph(graph, self._pool, side, "thread_local"):
                run()
        return graph.replay


def empty_cache() -> None:
    """Gives torch's unused GPU memory back, when no capture is under way."""
    with _CAPTURING:
        torch.cuda.empty_cache()
