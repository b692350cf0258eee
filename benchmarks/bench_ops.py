"""The fused ops against their plain PyTorch statements, on the maps of the CIFAR-10 network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ncsn_fast import ops, reference

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
