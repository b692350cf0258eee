"""Table of the providers of the forward benchmarks.

A provider is a function `(model, x) -> run` and a row of PROVIDERS. `run()` computes f(x) in
`dtype` with torch.get_num_threads() threads. Optional packages are imported inside the function.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import convolutions
import onnx_runtimes
import torch
from published import Plain, Published
from race import Absent
from torch import Tensor

from ncsn_fast import EngineUnavailable, ScoreModel
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.compiled import CompileEngine
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.ops import tiles

Run = Callable[[], Tensor]


def published(model: ScoreModel, x: Tensor) -> Run:
    """Returns the released code as published: eager, float32, NCHW."""
    return _eager(Published(model).eval(), x)


def eager_bf16(model: ScoreModel, x: Tensor) -> Run:
    """Returns the released code after the usual first changes: bfloat16 and channels-last."""
    return _eager(*_bf16_channels_last(Published(model), x))


def inductor_bf16(model: ScoreModel, x: Tensor) -> Run:
    """Returns torch.compile with frozen weights, as in the engine of that name."""
    import torch._dynamo

    torch._dynamo.reset()  # releases the networks of earlier races
    try:
        return _engine(CompileEngine, "bf16")(model, x)
    except EngineUnavailable as error:
        raise Absent(str(error)) from error


def _bf16_channels_last(network: Plain, x: Tensor) -> tuple[Plain, Tensor]:
    network = network.eval().to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, x.to(torch.bfloat16, memory_format=torch.channels_last)


def _eager(network: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            return network(x)

    return run


def _engine(kind: type[Engine], dtype: str, **options: Any) -> Callable[[ScoreModel, Tensor], Run]:
    """Returns a builder of an engine of this package."""

    def build(model: ScoreModel, x: Tensor) -> Run:
        engine = kind(model, device=torch.device("cpu"), dtype=dtype, batch_size=len(x), **options)

        def run() -> Tensor:
            with engine.context():
                return engine.network(x, None)

        return run

    return build


def _ours(dtype: str, convolutions: str | None = None) -> Callable[[ScoreModel, Tensor], Run]:
    """Returns a builder of the cpu engine.

    Convolutions None chooses the fastest on this machine.
    """
    return _engine(CpuEngine, dtype, convolutions=convolutions)


def ours_in_tiles(model: ScoreModel, x: Tensor) -> Run:
    """Returns the cpu engine with every convolution in tiles that can be, where there is AMX."""
    check_amx()
    return _ours("bf16", "amx")(model, x)


def check_amx() -> None:
    """Raises Absent, with the reason, unless AMX is used; the emulation of it is for tests."""
    if tiles.level() != "amx":
        raise Absent(f"AMX is {tiles.state()}")


@dataclasses.dataclass(frozen=True)
class Provider:
    """Row of PROVIDERS.

    Attributes:
        build: makes the network ready.   bound: allowed relative error of f.
        needs: packages that may be missing.
        complete: whether it computes all of f; if not, `run` checks its own part.
    """

    summary: str
    dtype: str
    build: Callable[[ScoreModel, Tensor], Any]
    bound: float
    needs: tuple[str, ...] = ()
    complete: bool = True

    def check(self) -> None:
        """Raises Absent, with the reason, if a package cannot be imported."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise Absent(f"package {name} cannot be imported: {error}") from error

    @property
    def is_onnx(self) -> bool:
        return "onnx" in self.needs

    @property
    def compiles(self) -> bool:
        """Whether its build takes long even for a tiny network."""
        return self.is_onnx or self.build is inductor_bf16


_BF16, _FP32, _OURS = 3e-2, 1e-4, 1e-5
_ORT, _OPENVINO = ("onnx", "onnxscript", "onnxruntime"), ("onnx", "onnxscript", "openvino")

PROVIDERS: dict[str, Provider] = {
    "published": Provider("as released: eager, NCHW", "fp32", published, _OURS),
    "eager-bf16": Provider("eager, channels-last", "bf16", eager_bf16, _BF16),
    "inductor-bf16": Provider("torch.compile, frozen weights", "bf16", inductor_bf16, _BF16),
    "ort": Provider("ONNX Runtime", "fp32", onnx_runtimes.ort, _FP32, _ORT),
    "openvino-fp32": Provider("OpenVINO", "fp32", onnx_runtimes.openvino("f32"), _FP32, _OPENVINO),
    "openvino-bf16": Provider("OpenVINO", "bf16", onnx_runtimes.openvino("bf16"), _BF16, _OPENVINO),
    "ours-fp32": Provider("engine cpu", "fp32", _ours("fp32"), _OURS),
    "ours-bf16": Provider("engine cpu", "bf16", _ours("bf16"), _BF16),
    "ours-bf16-direct": Provider(
        "engine cpu, oneDNN's convolutions only", "bf16", _ours("bf16", "direct"), _BF16
    ),
    "ours-bf16-amx": Provider("engine cpu, convolutions in tiles", "bf16", ours_in_tiles, _BF16),
    "convolutions-fp32": Provider(
        "only the convolutions", "fp32", convolutions.packed(torch.float32), _OURS, complete=False
    ),
    "convolutions-bf16": Provider(
        "only the convolutions", "bf16", convolutions.packed(torch.bfloat16), _BF16, complete=False
    ),
}
