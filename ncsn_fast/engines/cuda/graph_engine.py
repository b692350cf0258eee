"""Base class of engines that run the sampling loop on static GPU memory, in CUDA graphs."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ncsn_fast.engines.cuda.loop import MAX_NODES, Loop, LoopPlan
from ncsn_fast.engines.static_engine import BufferedEngine
from ncsn_fast.samplers.program import Chains, FusedUpdate, Program, Update

GRAPHS = ("level", "step", "loop", "none")


class GraphEngine(BufferedEngine):
    """An engine that runs program rows without the host: network, update, row counter.

    On the CPU, for tests, the same steps run uncaptured.

    Attributes:
        graph: scope of a captured CUDA graph, one of GRAPHS.
        scale, shift: the update writes scale * x + shift as the network's input.
    """

    device_types = ("cuda",)
    graph: str
    scale: float = 1.0
    shift: float = 0.0

    @abc.abstractmethod
    def new_plan(self, size: tuple[int, int]) -> LoopPlan:
        """Returns the network on static memory, for micro-batches of images of a size (H, W)."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with super().context(), self._current_device():
            yield

    def memory(self) -> int:
        loop = self.loop(self.model.config.image_size)
        return loop.plan.weight_bytes + loop.plan.map_bytes + loop.bytes

    def network(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        self.check_call(x, level, labels)
        with self._exclusive_use():
            loop = self.loop((x.shape[2], x.shape[3]))
            loop.holder = None  # the network input no longer belongs to the loaded chains
            loop.plan.load(x.to(self.device), self.scale, self.shift)
            if level is not None:
                loop.plan.level.copy_(level)
            loop.set_labels(labels)
            loop.forward()
            return loop.plan.output.clone()

    def chunks(self, program: Program) -> list[range]:
        if self.graph != "loop":
            return super().chunks(program)
        nodes = program.nfe * (self.loop(self.model.config.image_size).plan.launches + 2)
        if nodes > MAX_NODES:
            raise ValueError(
                f"graph='loop' would capture {nodes} launches for {program.nfe} evaluations, and "
                f"at most {MAX_NODES} are taken; use graph='level', which is as fast"
            )
        return [range(program.nfe)] if program.nfe else []

    def _stepper(
        self, program: Program, chains: Chains, levels: Tensor | None, update: Update | None
    ) -> Callable[[int, int], object]:
        if update is not None:  # noise that the caller supplies
            return super()._stepper(program, chains, levels, update)
        if program.has_history and chains.h is None:
            chains.h = torch.zeros_like(chains.x)
        holder = object()

        def run_rows(first: int, stop: int) -> None:
            if first == 0:
                FusedUpdate().begin(chains, program)
            with self._exclusive_use():
                loop = self.loop((chains.x.shape[2], chains.x.shape[3]))
                if first == 0 or loop.holder is not holder or loop.next_row != first:
                    loop.load(holder, program, chains, levels, first)
                loop.run(stop)
                loop.store(chains)

        return run_rows

    def release(self) -> None:
        if (done := getattr(self, "_done", None)) is not None:
            done.synchronize()  # the GPU may still use the buffers
        super().release()
        self._loops: dict[tuple[int, int], Loop] = {}
        self._last_call: torch.cuda.Event | None = None  # recorded at its end

    def loop(self, size: tuple[int, int]) -> Loop:
        """Returns the sampling loop for images of a size, created at first use."""
        with self._lock:
            if size not in self._loops:
                with self._exclusive_use(), self._current_device():
                    plan = self.new_plan(size)
                    self._loops[size] = Loop(plan, self.scale, self.shift, self.graph)
            return self._loops[size]

    def _current_device(self) -> contextlib.AbstractContextManager[object]:
        """Makes the engine's GPU the current one, for libraries that use no other."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()

    @contextlib.contextmanager
    def _exclusive_use(self) -> Iterator[None]:
        """Holds the engine's memory for one call, after the previous call on any stream."""
        on_gpu = self.device.type == "cuda"
        with self._lock:
            if on_gpu and self._last_call is not None:
                torch.cuda.current_stream(self.device).wait_event(self._last_call)
            try:
                yield
            finally:
                if on_gpu:
                    self._last_call = torch.cuda.Event()
                    self._last_call.record(torch.cuda.current_stream(self.device))
