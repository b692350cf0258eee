"""Benchmarks of the fused ops against plain PyTorch, on the maps of the CIFAR-10 network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
import torch.nn.functional as F
from race import Entrant, relative_error
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import cpu, reference
from ncsn_fast.ops.noise import Stream

SHAPES = {"128x32x32": (8, 128, 32, 32), "256x16x16": (8, 256, 16, 16)}
# Maps of the U-Nets for CIFAR-10 (NCSN++, DDPM++, EDM), and their attention (N, tokens, heads, D).
UNET_SHAPES = {
    "128x32x32": (8, 128, 32, 32),
    "256x16x16": (8, 256, 16, 16),
    "256x8x8": (8, 256, 8, 8),
}
ATTENTIONS = {"256x16x16": (8, 256, 1, 256), "8x8, 4 heads of 64": (8, 64, 4, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
PROVIDERS = ("torch", "reference", "kernel")
SECONDS = 2.0  # per race; rounds are short

Builders = dict[str, Callable[[], Entrant]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Benchmark of an op on given inputs.

    Attributes:
        runs: each provider's computation.   expected: the correct result.
        checked: replaces the compared result of a provider whose own result is random.
    """

    runs: dict[str, Callable[[], Tensor]]
    expected: Tensor
    info: dict[str, Any]
    bound: float = 1e-5
    checked: dict[str, Callable[[], Tensor]] = dataclasses.field(default_factory=dict)

    def builders(self, names: list[str]) -> Builders:
        return {name: functools.partial(self._enter, name) for name in names}

    def _enter(self, name: str) -> Entrant:
        @torch.inference_mode()
        def error() -> float:
            return relative_error(self.checked.get(name, self.runs[name])(), self.expected)

        return Entrant(torch.inference_mode()(self.runs[name]), error, self.bound, self.info)


def _maps(*shapes: tuple[int, ...], dtype: str) -> list[Tensor]:
    """Returns random channels-last maps."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in shapes]
    return [x.contiguous(memory_format=torch.channels_last) for x in drawn]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_norm_elu(race: Callable[..., None], shape: str, dtype: str, provider: str) -> None:
    """Times IN++ with ELU, channels-last; `torch` is the published formula in plain PyTorch."""

    def builders(settings: Any) -> Builders:
        x, parameters = _maps(SHAPES[shape], (3, SHAPES[shape][1], 1, 1), dtype=dtype)
        low = parameters.flatten(1).unbind()
        full = [p.float() for p in low]
        runs = {
            "torch": lambda: F.elu(published.instance_norm_plus(x, *low)),
            "reference": lambda: reference.instance_norm_plus(x, *full, elu=True),
            "kernel": lambda: ops.instance_norm_plus(x, *full, elu=True),
        }
        expected = reference.instance_norm_plus(x.double(), *full, elu=True)
        info = {"dtype": dtype, "batch": len(x), "bytes": 2 * x.numel() * x.element_size()}
        return Case(runs, expected, info, BOUNDS[dtype]).builders(settings.names)

    race(builders, f"IN++ with ELU, {dtype}, {shape}", seconds=SECONDS)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "modulated"])
@pytest.mark.parametrize("shape", UNET_SHAPES)
def bench_group_norm_silu(
    race: Callable[..., None], shape: str, form: str, dtype: str, provider: str
) -> None:
    """Times GroupNorm(32) with SiLU, channels-last; modulated: (1 + scale) y + shift before it."""

    def builders(settings: Any) -> Builders:
        n, c, _, _ = size = UNET_SHAPES[shape]
        x, row, rows = _maps(size, (2, c, 1, 1), (2, n, c, 1), dtype=dtype)
        low, (scale, shift) = row.flatten(1).unbind(), rows.unbind()
        gamma, beta = (p.float() for p in low)
        named = {"scale": rows[0, :, :, 0].float(), "shift": rows[1, :, :, 0].float()}
        named = named if form == "modulated" else {}
        factor = scale[..., None] + 1

        def plain() -> Tensor:
            y = F.group_norm(x, 32, *low)
            return F.silu(torch.addcmul(shift[..., None], y, factor) if named else y)

        def ours(call: Callable[..., Tensor], maps: Tensor) -> Tensor:
            return call(maps, 32, gamma, beta, **named, activation="silu")

        runs = {
            "torch": plain,
            "reference": lambda: ours(reference.group_norm, x),
            "kernel": lambda: ours(ops.group_norm, x),
        }
        info = {"dtype": dtype, "batch": n, "bytes": 2 * x.numel() * x.element_size()}
        expected = ours(reference.group_norm, x.double())
        return Case(runs, expected, info, BOUNDS[dtype]).builders(settings.names)

    race(builders, f"GroupNorm with SiLU, {form}, {dtype}, {shape}", seconds=SECONDS)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTIONS)
def bench_attention(race: Callable[..., None], shape: str, dtype: str, provider: str) -> None:
    """Times softmax attention of the tokens of a map, q, k and v side by side in one map."""

    def builders(settings: Any) -> Builders:
        n, tokens, heads, width = ATTENTIONS[shape]
        (whole,) = _maps((n, tokens, 3, heads * width), dtype=dtype)
        q, k, v = (part.unflatten(2, (heads, width)) for part in whole.contiguous().unbind(2))
        out = torch.empty(q.shape, dtype=q.dtype)

        def sdpa() -> Tensor:
            by_head = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*by_head).transpose(1, 2)

        runs = {
            "torch": sdpa,
            "reference": lambda: reference.attention(q, k, v),
            "kernel": lambda: cpu.attention_out(q, k, v, out),
        }
        flop = 4 * n * heads * tokens * tokens * width
        info = {"dtype": dtype, "batch": n, "bytes": 4 * out.nbytes, "flop": flop}
        expected = reference.attention(q.double(), k.double(), v.double())
        return Case(runs, expected, info, BOUNDS[dtype]).builders(settings.names)

    race(builders, f"attention, {dtype}, {shape}", seconds=SECONDS)


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_sampler_update(race: Callable[..., None], provider: str) -> None:
    """Times one Langevin step of 32 CIFAR-10 images, noise included; `torch` uses randn."""

    def builders(settings: Any) -> Builders:
        generator = torch.Generator().manual_seed(0)
        x, f = (torch.randn(32, 3, 32, 32, generator=generator) for _ in range(2))
        samples, coefficients = torch.arange(32), (1.0, 0.01, 0.0, 0.1, 0.0, 0.0)
        options: dict[str, Any] = {"seed": 1, "samples": samples, "step": 7}
        z = ops.normal(1, samples, Stream.SAMPLER, 7, (3, 32, 32))
        runs = {
            "torch": lambda: x + 0.01 * f + torch.randn_like(x) * 0.1,
            "reference": lambda: reference.sampler_update(x, f, None, coefficients, **options)[0],
            "kernel": lambda: ops.sampler_update(x, f, None, coefficients, **options)[0],
        }
        expected, _ = reference.sampler_update(x.double(), f, None, coefficients, **options)
        info = {"dtype": "fp32", "batch": len(x), "bytes": 3 * x.numel() * x.element_size()}
        checked = {"torch": lambda: x + 0.01 * f + z * 0.1}
        return Case(runs, expected, info, checked=checked).builders(settings.names)

    race(builders, "sampler update, 32 images of 32x32", seconds=SECONDS)


@dataclasses.dataclass(frozen=True)
class Maps:
    """Inputs a, b of one size, `half` of half that size, and buffers of both sizes."""

    a: Tensor
    b: Tensor
    half: Tensor

    @functools.cached_property
    def out(self) -> Tensor:
        return torch.empty_like(self.a)

    @functools.cached_property
    def total(self) -> Tensor:
        return torch.empty_like(self.a)

    @functools.cached_property
    def small(self) -> Tensor:
        return torch.empty_like(self.half)

    def double(self) -> Maps:
        return Maps(self.a.double(), self.b.double(), self.half.double())


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


@dataclasses.dataclass(frozen=True)
class CpuOp:
    """Op of the CPU engine: PyTorch's version, the reference, and the kernel that writes into Maps.

    `maps` counts the maps of the size of `a` that are read and written.
    """

    torch: Callable[[Maps], Tensor]
    reference: Callable[[Maps], Tensor]
    kernel: Callable[[Maps], Any]
    maps: float
    result: str = "out"

    def run_kernel(self, m: Maps) -> Tensor:
        self.kernel(m)
        return getattr(m, self.result)


CPU_OPS = {
    "elu": CpuOp(
        lambda m: F.elu(m.a),
        lambda m: reference.elu(m.a),
        lambda m: cpu.elu_out(m.a, m.out),
        2,
    ),
    "add_elu": CpuOp(
        lambda m: F.elu(m.a + m.b),
        lambda m: reference.add_elu(m.a, m.b)[1],
        lambda m: cpu.add_elu_out(m.a, m.b, total=m.total, out=m.out),
        4,
    ),
    "max_pool5": CpuOp(
        lambda m: F.max_pool2d(m.a, 5, stride=1, padding=2),
        lambda m: reference.max_pool5(m.a),
        lambda m: cpu.max_pool5_out(m.a, m.out),
        2,
    ),
    "avg_pool5": CpuOp(
        lambda m: F.avg_pool2d(m.a, 5, stride=1, padding=2),
        lambda m: reference.avg_pool5(m.a),
        lambda m: cpu.avg_pool5_out(m.a, m.out),
        2,
    ),
    "mean_pool2": CpuOp(
        lambda m: F.avg_pool2d(m.a + m.b, 2),
        lambda m: reference.mean_pool2(m.a, m.b),
        lambda m: cpu.mean_pool2_out(m.a, m.small, b=m.b),
        2.25,
        result="small",
    ),
    "resize_add": CpuOp(
        lambda m: m.a + _resize(m.half, m.a),
        lambda m: reference.resize_add(m.half, (m.a.shape[2], m.a.shape[3]), m.a),
        lambda m: cpu.resize_add_out(m.half, m.out, a=m.a),
        2.25,
    ),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", CPU_OPS)
def bench_cpu_op(race: Callable[..., None], op: str, shape: str, dtype: str, provider: str) -> None:
    """Times an op that the CPU engine runs between two convolutions, channels-last."""

    def builders(settings: Any) -> Builders:
        n, c, height, width = size = SHAPES[shape]
        m = Maps(*_maps(size, size, (n, c, height // 2, width // 2), dtype=dtype))
        row = CPU_OPS[op]
        runs = {"torch": row.torch, "reference": row.reference, "kernel": row.run_kernel}
        info = {"dtype": dtype, "batch": n, "bytes": int(row.maps * m.a.nbytes)}
        return Case(
            {name: functools.partial(run, m) for name, run in runs.items()},
            row.reference(m.double()),
            info,
            BOUNDS[dtype],
        ).builders(settings.names)

    race(builders, f"{op}, {dtype}, {shape}", seconds=SECONDS)
