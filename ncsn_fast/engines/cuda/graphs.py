"""Repeated steps as CUDA graphs, each captured once and replayed from then on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

import torch

log = logging.getLogger(__name__)
_CAPTURING = threading.Lock()  # one capture at a time in a process


Call = Callable[[], object]


class Graphs:
    """CUDA graphs of one or several calls of a step, captured at first use.

    On the CPU, with captures=False, and after a capture that failed, calls are made one by one.
    """

    def __init__(self, device: torch.device, *, captures: bool) -> None:
        self.device = device
        self.captures = captures and device.type == "cuda"
        self._replays: dict[tuple[Hashable, int], Call] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        # torch's default capture stream is on the device of the process's first capture.
        self._stream = torch.cuda.Stream(device) if self.captures else None

    def __len__(self) -> int:
        return len(self._replays)

    def repeat(self, key: Hashable, calls: int, step: Call, warm_up: Call) -> None:
        """Calls a step `calls` times.

        Args:
            key: identifies the step; equal keys mean the same step.
            warm_up: a call of the step without side effects. It runs before a capture, because the
                first
                call compiles kernels and selects algorithms, which a capture must not contain.
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
            try:
                with torch.cuda.graph(graph, self._pool, side, "thread_local"):
                    run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of an operation of PyTorch that no graph can hold
                self._give_up(error)
                return run
        return graph.replay

    def _give_up(self, error: RuntimeError) -> None:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        log.warning(
            "no CUDA graph of this network can be captured (%s): every operation is launched by "
            "itself, as with graph='none'",
            reason,
        )
        self.captures, self._stream = False, None


def empty_cache() -> None:
    """Releases torch's unused GPU memory while no capture is under way."""
    with _CAPTURING:
        torch.cuda.empty_cache()
