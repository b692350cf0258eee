"""Benchmarks of a network that a user brings (user_unet.py): one forward on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from providers import Run
from race import Absent, Entrant, relative_error
from torch import Tensor
from user_unet import model

from ncsn_fast import EngineUnavailable, ScoreModel
from ncsn_fast.engines.compiled import CompileEngine
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.inference.cost import network_flop

BATCHES = {"b1": 1, "b8": 8}


def eager(of: ScoreModel, x: Tensor, c: Tensor) -> Run:
    """Returns the network as its users run it: eager, float32, NCHW."""

    def run() -> Tensor:
        with torch.inference_mode():
            return of(x, c)

    return run


def engine(kind: type, dtype: str) -> Callable[[ScoreModel, Tensor, Tensor], Run]:
    """Returns a builder of an engine of this package."""

    def build(of: ScoreModel, x: Tensor, c: Tensor) -> Run:
        try:
            made = kind(of, device=torch.device("cpu"), dtype=dtype, batch_size=len(x))
        except EngineUnavailable as error:
            raise Absent(str(error)) from error

        def run() -> Tensor:
            with made.context():
                return made.network(x, c)

        return run

    return build


def openvino(precision: str) -> Callable[[ScoreModel, Tensor, Tensor], Run]:
    """Returns a builder of OpenVINO's CPU plugin on our ONNX file: one stream, for latency."""

    def build(of: ScoreModel, x: Tensor, c: Tensor) -> Run:
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
        core = ov.Core()
        read = core.read_model(make_onnx(of, batch=len(x)))
        request = core.compile_model(read, "CPU", settings).create_infer_request()
        sigma, form = SIGMA.expand(len(x)), of.parameterisation.linear_form(SIGMA)
        state = (x.double() - form.shift) / form.scale
        feeds = {"x": state.float().numpy(), "sigma": sigma.float().numpy()}

        def run() -> Tensor:
            request.infer(feeds, share_inputs=True)
            f = torch.from_numpy(request.get_output_tensor().data)
            return f / float(form.out)  # epsilon: the graph gives sigma * score = out * F

        return run

    return build


SIGMA = torch.tensor([1.0], dtype=torch.float64)
PROVIDERS: dict[str, tuple[str, str, Callable[[ScoreModel, Tensor, Tensor], Run], float]] = {
    "eager": ("eager, NCHW", "fp32", eager, 1e-5),
    "inductor": ("torch.compile, frozen weights", "fp32", engine(CompileEngine, "fp32"), 1e-4),
    "inductor-bf16": (
        "torch.compile, frozen weights", "bf16", engine(CompileEngine, "bf16"), 3e-2,
    ),
    "openvino-fp32": ("OpenVINO", "fp32", openvino("f32"), 1e-4),
    "openvino-bf16": ("OpenVINO", "bf16", openvino("bf16"), 3e-2),
    "ours-fp32": ("engine cpu", "fp32", engine(CpuEngine, "fp32"), 1e-5),
    "ours-bf16": ("engine cpu", "bf16", engine(CpuEngine, "bf16"), 3e-2),
}  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES)
def bench_unet(race: Callable[..., None], batch: str, provider: str) -> None:
    """Times F(u, t) of inputs given as float32 NCHW."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        return {name: functools.partial(_enter, name, batch, settings) for name in settings.names}

    race(builders, f"diffusers' DDPM U-Net 32x32, B = {BATCHES[batch]}")


def _enter(name: str, batch: str, settings: Any) -> Entrant:
    summary, dtype, build, bound = PROVIDERS[name]
    if settings.small and name.startswith(("inductor", "openvino")):
        raise Absent("a small run compiles nothing of this network")
    of = model(settings.small)
    n = BATCHES[batch]
    x = torch.randn(n, *of.image_shape, generator=torch.Generator().manual_seed(1))
    c = of.condition(SIGMA)
    assert c is not None
    c = c.expand(n).contiguous()
    run = build(of, x, c)
    expected = eager(of, x, c)()
    info = {
        "workload": f"ddpm-cifar10-{batch}", "dtype": dtype, "summary": summary, "batch": n,
        "flop": n * network_flop(of),
    }  # fmt: skip
    return Entrant(run, lambda: relative_error(run(), expected), bound, info)
