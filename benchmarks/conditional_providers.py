"""Table of the providers of networks that see the noise level: one forward F(x, c, labels)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from race import Absent, Entrant, relative_error
from torch import Tensor

from ncsn_fast import EngineUnavailable, ScoreModel
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.compiled import CompileEngine
from ncsn_fast.engines.cpu import plan
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.inference.cost import network_flop

Run = Callable[[], Tensor]
_PROFILE_ROUNDS = 25
SIGMA = torch.tensor([1.0], dtype=torch.float64)  # noise level of the images, in the unit of x


@dataclasses.dataclass(frozen=True)
class Forward:
    """A network and its inputs.

    Attributes:
        x: (B, C, H, W), the network's input.   c: (B,), the noise level as the network sees it.
        labels: (B,) int64, or None for networks without classes.
    """

    model: ScoreModel
    x: Tensor
    c: Tensor
    labels: Tensor | None = None

    @classmethod
    def of(cls, model: ScoreModel, batch: int) -> Forward:
        """Returns the forward of `batch` random images, with each class in turn."""
        x = torch.randn(batch, *model.image_shape, generator=torch.Generator().manual_seed(1))
        c = model.condition(SIGMA)
        assert c is not None
        labels = torch.arange(batch) % model.n_classes if model.n_classes else None
        return cls(model, x, c.expand(batch).contiguous(), labels)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Returns the arguments of a call of the network."""
        return (self.x, self.c) if self.labels is None else (self.x, self.c, self.labels)


def eager(of: Forward) -> Run:
    """Returns the network as its users run it: eager, float32, NCHW."""

    def run() -> Tensor:
        with torch.inference_mode():
            return of.model(*of.inputs)

    return run


@dataclasses.dataclass(frozen=True)
class EngineRun:
    """The network as an engine of this package runs it."""

    engine: Engine
    inputs: tuple[Tensor, ...]

    def __call__(self) -> Tensor:
        with self.engine.context():
            return self.engine.network(*self.inputs)


def engine(kind: type, dtype: str) -> Callable[[Forward], Run]:
    """Returns a builder of an engine of this package."""

    def build(of: Forward) -> Run:
        try:
            made = kind(of.model, device=torch.device("cpu"), dtype=dtype, batch_size=len(of.x))
        except EngineUnavailable as error:
            raise Absent(str(error)) from error
        return EngineRun(made, of.inputs)

    return build


def copying(dtype: str) -> Callable[[Forward], Run]:
    """Returns a builder of the engine for CPUs that copies every operand of a concatenation."""

    def build(of: Forward) -> Run:
        with mock.patch.object(plan, "write_in_place", lambda graph, writes: graph):
            run = engine(CpuEngine, dtype)(of)
            run()  # builds the plan
        return run

    return build


def shares(run: Run) -> dict[str, float]:
    """Returns the share of each kind of operation in the time of the engine for CPUs, if it is it.

    Times are those of `describe`.
    """
    if not isinstance(run, EngineRun) or not isinstance(run.engine, CpuEngine):
        return {}
    profile = run.engine.profile(_PROFILE_ROUNDS)
    total, found = sum(seconds for _, seconds in profile), Counter[str]()
    for cost, seconds in profile:
        found[cost.kind] += seconds / total
    return dict(found)


def openvino(precision: str) -> Callable[[Forward], Run]:
    """Returns a builder of OpenVINO's CPU plugin on our ONNX file: one stream, for latency."""

    def build(of: Forward) -> Run:
        try:
            import openvino as ov
        except ImportError as error:
            raise Absent(f"package openvino cannot be imported: {error}") from error
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        core, batch = ov.Core(), len(of.x)
        read = core.read_model(make_onnx(of.model, batch=batch))
        request = core.compile_model(read, "CPU", settings).create_infer_request()
        form = of.model.parameterisation.linear_form(SIGMA)
        state = (of.x.double() - form.shift) / form.scale
        # The graph gives sigma * score = skip x + out F + const.
        rest, out = (form.skip * state + form.const).float(), float(form.out)
        feeds = {"x": state.float().numpy(), "sigma": SIGMA.expand(batch).float().numpy()}
        if of.labels is not None:
            feeds["labels"] = of.labels.numpy()

        def run() -> Tensor:
            request.infer(feeds, share_inputs=True)
            return (torch.from_numpy(request.get_output_tensor().data) - rest) / out

        return run

    return build


@dataclasses.dataclass(frozen=True)
class Provider:
    """Row of a table of providers; bound is the allowed relative error of F."""

    summary: str
    dtype: str
    build: Callable[[Forward], Run]
    bound: float


EAGER = Provider("eager, NCHW", "fp32", eager, 1e-5)
OTHERS: dict[str, Provider] = {
    "inductor": Provider(
        "torch.compile, frozen weights", "fp32", engine(CompileEngine, "fp32"), 1e-4
    ),
    "inductor-bf16": Provider(
        "torch.compile, frozen weights", "bf16", engine(CompileEngine, "bf16"), 3e-2
    ),
    "openvino-fp32": Provider("OpenVINO", "fp32", openvino("f32"), 1e-4),
    "openvino-bf16": Provider("OpenVINO", "bf16", openvino("bf16"), 3e-2),
    "ours-fp32": Provider("engine cpu", "fp32", engine(CpuEngine, "fp32"), 1e-5),
    "ours-bf16": Provider("engine cpu", "bf16", engine(CpuEngine, "bf16"), 3e-2),
}


def enter(provider: Provider, of: Forward, workload: str, *, small: bool) -> Entrant:
    """Makes a provider ready to race; a small run has none that compiles the network.

    Raises:
        Absent: it cannot run here.
    """
    if small and provider.summary.startswith(("torch.compile", "OpenVINO")):
        raise Absent("a small run compiles nothing of this network")
    run, expected = provider.build(of), eager(of)()
    info: dict[str, Any] = {
        "unet": workload, "dtype": provider.dtype, "summary": provider.summary,
        "batch": len(of.x), "flop": len(of.x) * network_flop(of.model),
    }  # fmt: skip
    if found := shares(run):
        info["shares"] = found
    return Entrant(run, lambda: relative_error(run(), expected), provider.bound, info)
