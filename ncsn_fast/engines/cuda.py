"""engine="cuda": cuDNN's convolutions with our kernels between them, sampling in CUDA graphs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ncsn_fast._backends import DEFAULT_FAMILY
from ncsn_fast.engines import gpu_kernels
from ncsn_fast.engines.arena import report
from ncsn_fast.engines.base import DTYPES, without_weights
from ncsn_fast.engines.cuda_loop import MOST_NODES, Loop
from ncsn_fast.engines.cuda_plan import CudaPlan, Weights
from ncsn_fast.engines.fusion import fuse
from ncsn_fast.engines.graph import lower
from ncsn_fast.engines.planned import PlannedEngine
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.program import Chains, FusedUpdate, Program, Update

_PROFILE_ROUNDS = 5


class CudaEngine(PlannedEngine):
    """A network as kernel launches on static memory; a sampler's loop as CUDA graphs.

    Channels-last. Between two convolutions there is one pass of ours, and the sampler update makes
    its noise itself and writes the network's next input. A graph is captured once for a micro-batch
    and serves every level, seed and call; nothing waits for the GPU inside a level.

    Built on the CPU, for tests, the same steps run uncaptured.

    Args:
        graph: what is captured: the rows of a noise "level", a "step", the whole "loop" (no
            callback or progress inside, and memory for every launch), or "none".
        kernels: "triton", or "cuda" for norm and update in CUDA C++.
        tune: let cuDNN time its algorithms: "on" may be faster, but two processes may then choose
            differently and their samples differ by rounding.

    Raises:
        UnsupportedNetwork: the network has parts that the plan does not cover (see `refuses`).
        EngineError: the output differs from the reference by more than precision.BOUNDS.
    """

    name = "cuda"
    summary = "channels-last convolutions, our GPU kernels between them, CUDA graphs"
    dtypes = ("bf16", "fp16", "tf32", "fp32")
    device_types = ("cuda",)
    options: ClassVar[dict[str, tuple[str, ...]]] = {
        "graph": ("level", "step", "loop", "none"),
        "kernels": gpu_kernels.FAMILIES,
        "tune": ("off", "on"),
    }

    def __init__(
        self,
        model: ScoreModel,
        *,
        graph: str = "level",
        kernels: str = DEFAULT_FAMILY,
        tune: str = "off",
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self._done: torch.cuda.Event | None = None  # when the last call has
        self.check_options({"graph": graph, "kernels": kernels, "tune": tune})
        self.graph = graph
        self._kernels = gpu_kernels.load(
            kernels, self.device, tf32=self.dtype == "tf32", tune=tune == "on"
        )
        self._weights: Weights = {}  # shared by all plans
        self._scale, self._shift = (2.0, -1.0) if model.net.scale_input else (1.0, 0.0)
        self.release()
        self.error = self.check_precision()
        self.model = without_weights(model)  # they are on the GPU: the caller may let go of theirs

    @classmethod
    def unavailable(cls) -> str | None:
        return gpu_kernels.problem()

    @classmethod
    def default_dtype(cls) -> str:
        gpu = torch.cuda.is_available()
        emulated = gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "fp16" if emulated else "bf16"  # before Ampere

    def memory(self) -> int:
        loop = self._loop(self.model.config.image_size)
        return loop.plan.weight_bytes + loop.plan.map_bytes + loop.bytes

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        guard = torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()
        with super().context(), guard:
            yield

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        self.check_call(x, level)
        with self._turn():
            loop = self._loop((x.shape[2], x.shape[3]))
            loop.holder = None  # the network's input is no longer that of its chains
            loop.plan.load(x.to(self.device), self._scale, self._shift)
            if level is not None:
                loop.plan.level.copy_(level)
            loop.plan.run()
            return loop.plan.output.clone()

    def chunks(self, program: Program) -> list[range]:
        if self.graph != "loop":
            return super().chunks(program)
        plan = self._loop(self.model.config.image_size).plan
        nodes = program.nfe * (len(plan.steps) + 2)
        if nodes > MOST_NODES:
            raise ValueError(
                f"graph='loop' would capture {nodes} launches for {program.nfe} evaluations, and "
                f"at most {MOST_NODES} are taken; use graph='level', which is as fast"
            )
        return [range(program.nfe)] if program.nfe else []

    def stepper(
        self, program: Program, chains: Chains, levels: Tensor | None, update: Update | None
    ) -> Callable[[int, int], object]:
        if update is not None:  # noise of the caller's own
            return super().stepper(program, chains, levels, update)
        self.check_images(chains.x)
        if program.has_history and chains.h is None:
            chains.h = torch.zeros_like(chains.x)
        holder = object()

        def run_rows(first: int, stop: int) -> None:
            if first == 0:
                FusedUpdate().begin(chains, program)
            with self._turn():
                loop = self._loop((chains.x.shape[2], chains.x.shape[3]))
                if first == 0 or loop.holder is not holder or loop.next_row != first:
                    loop.load(holder, program, chains, levels, first)
                loop.run(stop)
                loop.store(chains)

        return run_rows

    def describe(self) -> str:
        """The plan, one line an operation: shape, milliseconds, GFLOP/s or GB/s, share of all.

        Launched one by one with a wait after each: short operations look longer than in a graph.
        """
        plan = self._loop(self.model.config.image_size).plan
        with self.context(), self._busy:
            plan.run()
            rounds = [[self._seconds(s) for s in plan.steps] for _ in range(_PROFILE_ROUNDS)]
        seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
        return (
            f"{report(plan.lines, seconds, self.dtype)}; "
            f"weights {plan.weight_bytes / 1e6:.1f} MB, maps {plan.map_bytes / 1e6:.1f} MB"
        )

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The engine's memory for one call: after the last one, on whatever stream that was."""
        on_gpu = self.device.type == "cuda"
        with self._busy:
            if on_gpu and self._done is not None:
                torch.cuda.current_stream(self.device).wait_event(self._done)
            yield
            if on_gpu:
                self._done = torch.cuda.Event()
                self._done.record(torch.cuda.current_stream(self.device))

    def _seconds(self, step: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            step()
            after.record()
            after.synchronize()
            return before.elapsed_time(after) / 1e3
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def release(self) -> None:
        super().release()
        self._loops: dict[tuple[int, int], Loop] = {}
        self._done = None

    def _loop(self, size: tuple[int, int]) -> Loop:
        with self._busy:
            if size not in self._loops:
                graph = fuse(lower(self.model.net, *size))
                plan = CudaPlan(
                    graph,
                    self.model.config.channels,
                    self.batch_size,
                    DTYPES[self.dtype],
                    self.device,
                    self._kernels,
                    self._weights,
                )
                self._loops[size] = Loop(plan, self._scale, self._shift, self.graph)
            return self._loops[size]
