"""engine="cuda": cuDNN convolutions, our fused kernels between them, sampling in CUDA graphs."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ncsn_fast.engines.base import DTYPES
from ncsn_fast.engines.cuda import kernels as gpu_kernels
from ncsn_fast.engines.cuda.graph_engine import GRAPHS, GraphEngine
from ncsn_fast.engines.cuda.plan import CudaPlan
from ncsn_fast.engines.lowering.fusion import fuse
from ncsn_fast.engines.lowering.memory_plan import format_profile
from ncsn_fast.engines.lowering.static_memory import Weights
from ncsn_fast.engines.lowering.torch_steps import waits_for_host
from ncsn_fast.engines.static_engine import StaticEngine, noise_dtype
from ncsn_fast.models.classes import default_label
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.backends import DEFAULT_FAMILY

log = logging.getLogger(__name__)
_PROFILE_ROUNDS = 5


class CudaEngine(GraphEngine, StaticEngine):
    """A network as kernel launches on static memory, with sampling loops as CUDA graphs.

    Channels-last. One fused pass of ours runs between two convolutions; the sampler update
    generates its own noise and writes the network's next input. What no kernel of ours covers is
    run by PyTorch, as steps of the same plan, and `describe` names them. A graph is captured once
    per micro-batch size and serves every level, seed and call; within a level nothing waits for the
    GPU.

    On the CPU, for tests, the same steps run uncaptured.

    Args:
        graph: scope of a captured graph: the rows of a noise "level", one "step", the whole "loop"
            (no callback or progress inside, and memory for every launch), or "none".
        kernels: "triton", or "cuda" for norms and update in CUDA C++.
        tune: "on" lets cuDNN time its algorithms. It may be faster, but two processes may choose
            differently, and their samples then differ by rounding.

    Raises:
        UnsupportedNetwork: torch cannot export the network (see `refuses`).
        EngineError: the output differs from the reference by more than precision.BOUNDS.
    """

    name = "cuda"
    summary = "channels-last convolutions, our GPU kernels between them, CUDA graphs"
    dtypes = ("bf16", "fp16", "tf32", "fp32")
    options: ClassVar[dict[str, tuple[str, ...]]] = {
        "graph": GRAPHS,
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
        self.check_options({"graph": graph, "kernels": kernels, "tune": tune})
        self.graph = graph
        self._variant = {"kernels": kernels, "tune": tune}
        self._kernels = gpu_kernels.load(
            kernels, self.device, tf32=self.dtype == "tf32", tune=tune == "on"
        )
        self._weights: Weights = {}  # shared by all plans
        lowered = self.lowered(model.config.image_size)
        self.scale, self.shift = lowered.scale, lowered.shift
        if graph != "none" and (waiting := waits_for_host(lowered)) is not None:
            log.warning(
                "PyTorch waits for the GPU in this network (%s), so no CUDA graph of it can be "
                "captured: every operation is launched by itself, as with graph='none'",
                waiting,
            )
            self.graph = "none"
        self.release()
        self.error = self.check_precision()
        self.forget_weights()  # the GPU has copies; the caller may free theirs

    def prepare(self) -> None:
        with self.context():
            self.loop(self.model.config.image_size)

    def check_facts(self) -> dict[str, Any]:
        facts = {**super().check_facts(), **self._variant}
        if self.device.type == "cuda":
            gpu = torch.cuda.get_device_properties(self.device)
            facts |= {"gpu": gpu.name, "capability": [gpu.major, gpu.minor]}
            facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
            facts |= {"triton": getattr(sys.modules.get("triton"), "__version__", None)}
        return facts

    @classmethod
    def unavailable(cls) -> str | None:
        return gpu_kernels.problem()

    @classmethod
    def default_dtype(cls, device: torch.device) -> str:
        gpu = torch.cuda.is_available()
        emulated = gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "fp16" if emulated else "bf16"  # before Ampere

    def new_plan(self, size: tuple[int, int]) -> CudaPlan:
        return CudaPlan(
            fuse(self.lowered(size)),
            self.model.config.channels,
            self.batch_size,
            DTYPES[self.dtype],
            self.device,
            self._kernels,
            self._weights,
            level=noise_dtype(self.model),
            default_label=default_label(self.model.config),
        )

    def describe(self) -> str:
        """Describes the plan, one line per operation: shape, milliseconds, GFLOP/s or GB/s, share.

        Operations are launched one at a time and waited for: short ones look slower than in a
        graph.
        """
        plan = self.loop(self.model.config.image_size).plan
        assert isinstance(plan, CudaPlan)
        with self.context(), self._lock:
            plan.run()
            rounds = [[self._seconds(s) for s in plan.steps] for _ in range(_PROFILE_ROUNDS)]
        seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
        return (
            f"{format_profile(plan.costs, seconds, self.dtype)}; "
            f"weights {plan.weight_bytes / 1e6:.1f} MB, maps {plan.map_bytes / 1e6:.1f} MB"
        )

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
