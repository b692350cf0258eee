"""The fused ops against their plain PyTorch statements, on the maps of the CIFAR-10 network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast import cpu_ops, ops, reference

SHAPES = {"128x32x32": (8, 128, 32, 32), "256x16x16": (8, 256, 16, 16)}
PROVIDERS: dict[str, dict[str, Callable[..., Any]]] = {
    "norm": {"reference": reference.instance_norm_plus, "kernel": ops.instance_norm_plus},
    "update": {"reference": reference.sampler_update, "kernel": ops.sampler_update},
}


@pytest.mark.parametrize("provider", PROVIDERS["norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_norm_elu(benchmark: Any, shape: str, dtype: torch.dtype, provider: str) -> None:
    """IN++ with ELU, channels-last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[shape], generator=generator).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    parameters = [torch.randn(x.shape[1], generator=generator) for _ in range(3)]
    expected = reference.instance_norm_plus(x.double(), *parameters, elu=True)
    run = PROVIDERS["norm"][provider]
    y = run(x, *parameters, elu=True)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert (y.double() - expected).norm() <= bound * expected.norm()
    benchmark.extra_info["bytes"] = 2 * x.numel() * x.element_size()
    benchmark(run, x, *parameters, elu=True)


@pytest.mark.parametrize("provider", PROVIDERS["update"])
def bench_sampler_update(benchmark: Any, provider: str) -> None:
    """One Langevin step of 32 CIFAR-10 images, noise included."""
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(32, 3, 32, 32, generator=generator) for _ in range(2))
    coefficients = (1.0, 0.01, 0.0, 0.1, 0.0, 0.0)
    options = {"seed": 1, "samples": torch.arange(32), "step": 7}
    expected, _ = reference.sampler_update(x.double(), f, None, coefficients, **options)
    run = PROVIDERS["update"][provider]
    y, _ = run(x, f, None, coefficients, **options)
    assert (y - expected).abs().max() <= 1e-5
    benchmark.extra_info["bytes"] = 3 * x.numel() * x.element_size()
    benchmark(run, x, f, None, coefficients, **options)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


# Each op of the CPU engine on maps a and b, a map `half` of half their size, and buffers of both
# sizes: what PyTorch runs, the kernel, the reference, and how many maps are read and written.
CPU_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], float]] = {
    "elu": (
        lambda a, b, half: F.elu(a),
        lambda a, b, half, out, total, small: cpu_ops.elu_out(a, out),
        lambda a, b, half: reference.elu(a),
        2,
    ),
    "add_elu": (
        lambda a, b, half: F.elu(a + b),
        lambda a, b, half, out, total, small: cpu_ops.add_elu_out(a, b, total=total, out=out),
        lambda a, b, half: reference.add_elu(a, b)[1],
        4,
    ),
    "max_pool5": (
        lambda a, b, half: F.max_pool2d(a, 5, stride=1, padding=2),
        lambda a, b, half, out, total, small: cpu_ops.max_pool5_out(a, out),
        lambda a, b, half: reference.max_pool5(a),
        2,
    ),
    "avg_pool5": (
        lambda a, b, half: F.avg_pool2d(a, 5, stride=1, padding=2),
        lambda a, b, half, out, total, small: cpu_ops.avg_pool5_out(a, out),
        lambda a, b, half: reference.avg_pool5(a),
        2,
    ),
    "mean_pool2": (
        lambda a, b, half: F.avg_pool2d(a + b, 2),
        lambda a, b, half, out, total, small: cpu_ops.mean_pool2_out(a, small, b=b),
        lambda a, b, half: reference.mean_pool2(a, b),
        2.25,
    ),
    "resize_add": (
        lambda a, b, half: a + _resize(half, a.shape[2:]),
        lambda a, b, half, out, total, small: cpu_ops.resize_add_out(half, out, a=a),
        lambda a, b, half: reference.resize_add(half, a.shape[2:], a),
        2.25,
    ),
}


@pytest.mark.parametrize("provider", ["torch", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", CPU_OPS)
def bench_cpu_op(benchmark: Any, op: str, shape: str, dtype: torch.dtype, provider: str) -> None:
    """What the CPU engine runs between two convolutions, channels-last."""
    generator = torch.Generator().manual_seed(0)
    n, c, height, width = SHAPES[shape]
    a, b, half = (
        torch.randn(size, generator=generator).to(dtype).to(memory_format=torch.channels_last)
        for size in ((n, c, height, width), (n, c, height, width), (n, c, height // 2, width // 2))
    )
    eager, kernel, specification, maps = CPU_OPS[op]
    expected = specification(a.double(), b.double(), half.double())
    inputs = (a, b, half)
    if provider == "kernel":
        inputs = (*inputs, torch.empty_like(a), torch.empty_like(a), torch.empty_like(half))
    run = {"torch": eager, "kernel": kernel}[provider]
    y = run(*inputs)
    y = inputs[3] if y is None else y
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert (y.double() - expected).norm() <= bound * expected.norm()
    benchmark.extra_info["bytes"] = int(maps * a.numel() * a.element_size())
    benchmark(run, *inputs)
