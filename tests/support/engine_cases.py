"""Small models, and chains to run on them, for the tests of engines."""

from __future__ import annotations

import tiny
import torch
from torch import Tensor

from ncsn_fast import ScoreModel
from ncsn_fast.engines import precision
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cuda import kernels
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.cuda.plan import CudaPlan
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.lowering.fusion import fuse
from ncsn_fast.engines.lowering.graph import Graph, Map
from ncsn_fast.models.architectures import ARCHITECTURES, Architecture, Refine, Stage
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program import Chains, Program

CPU = torch.device("cpu")
LEVELS = 6
TYPES = CpuEngine.dtypes  # the smallest first
SMALLEST = TYPES[0]


def model(arch: str = "ncsnv2", **fields) -> ScoreModel:
    settings = {"image_size": (16, 16), "channels": 3, "ngf": 16, "n_sigmas": LEVELS}
    return tiny.model(**{**settings, "arch": arch, **fields})


def float32_bound(of: ScoreModel, n: int = LEVELS) -> float:
    """The largest error that an fp32 engine may have in a check of n levels."""
    reference = EagerEngine(of, device=CPU, dtype="fp32", batch_size=2)
    x, levels = precision.probes(of, n)
    condition = of.condition(of.sigmas[levels])
    exact = reference.exact(x, condition)
    own = precision.relative_error(reference.output(x, condition), exact)
    return max(precision.BOUNDS["fp32"], 4 * float(own.max()))


def program_of(of: ScoreModel, name: str = "ald", **options) -> Program:
    return methods.build(name, of, None, options)


def chains_of(of: ScoreModel, n: int = 2, seed: int = 3, device: torch.device = CPU) -> Chains:
    x = torch.rand(n, *of.image_shape, generator=torch.Generator().manual_seed(0))
    return Chains(x=x.to(device), seed=seed, samples=torch.arange(n, device=device))


class CudaOnCpu(CudaEngine):
    """The engine for GPUs where there is none: its steps, uncaptured, by the extension."""

    device_types = ("cpu",)

    def __init__(self, model: ScoreModel, *, kernels: str = "cuda", **settings) -> None:
        super().__init__(model, kernels=kernels, **settings)

    @classmethod
    def unavailable(cls) -> str | None:
        return None


def fused_output(
    graph: Graph, x: Tensor, *conditions: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns what a plan for GPUs computes of a lowered graph, on the CPU."""
    level = conditions[0].dtype if conditions else None
    plan = CudaPlan(
        fuse(graph), graph.output.channels, len(x), dtype, CPU, kernels.load("cuda", CPU),
        level=level, default_label=9 if len(conditions) > 1 else None,
    )  # fmt: skip
    for target, condition in zip((plan.level, plan.labels), conditions, strict=False):
        assert target is not None
        target.copy_(condition)
    plan.load(x, graph.scale, graph.shift)
    plan.run()
    return plan.output.float()


def lives(graph: Graph) -> dict[Map, list[int]]:
    """Returns the first and last use of each map, merging maps that must share memory."""
    owner, spans = {graph.input: graph.input}, {graph.input: [0, len(graph.ops)]}
    for moment, op in enumerate(graph.ops):
        for x in op.inputs:
            spans[owner[x]][1] = max(spans[owner[x]][1], moment)
        for y in op.outputs:
            owner[y] = owner[dict(op.overwrites).get(y, y)] if y in dict(op.overwrites) else y
            spans.setdefault(owner[y], [moment, moment])
    spans[owner[graph.output]][1] = len(graph.ops)
    return spans


def small(conditional: bool = False, stages: int = 2, **fields) -> ScoreModel:
    """Returns a network of one stage, or of two and a fusion, for slow devices.

    Compilers and Triton's interpreter are slow with every operation.
    """
    name = f"tests-{stages}-stages-{conditional}"
    upper, lower = Stage("res1", 1), Stage("res2", 2, down=True)
    refine = {
        1: (Refine("refine1", "res1", 1),),
        2: (Refine("refine1", "res2", 2), Refine("refine2", "res1", 1)),
    }
    ARCHITECTURES[name] = Architecture(
        (upper, lower)[:stages], refine[stages], conditional=conditional
    )
    return model(name, image_size=(8, 8), ngf=8, n_sigmas=2, **fields)
