"""Whole networks and whole samplings: each engine side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ncsn_fast
from ncsn_fast import ModelConfig, Sampler, ScoreModel, ops

ENGINES = [("eager", "fp32"), ("cpu", "fp32"), ("cpu", "bf16")]


@pytest.fixture(scope="module")
def cifar10() -> ScoreModel:
    """NCSNv2 for CIFAR-10, 29.69 M parameters, random weights: enough for speed."""
    torch.manual_seed(0)
    return ScoreModel(ModelConfig()).eval()


@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=["-".join(e) for e in ENGINES])
def bench_network(benchmark: Any, cifar10: ScoreModel, engine: str, dtype: str) -> None:
    """One forward of 8 images."""
    sampler = Sampler(cifar10, engine=engine, dtype=dtype, batch_size=8)
    x = torch.rand(8, 3, 32, 32)
    with torch.inference_mode(), ops.backend("reference"):
        expected = cifar10(x)
    built = sampler.engine_for(8)
    bound = 2e-2 if dtype == "bf16" else 1e-5
    assert (built.output(x, None) - expected).norm() <= bound * expected.norm()
    benchmark.extra_info["flop"] = 8 * ncsn_fast.plan.network_flop(cifar10)
    benchmark.pedantic(built.output, args=(x, None), rounds=2, warmup_rounds=1)


@pytest.mark.parametrize("method", ["cas", "ald"])
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def bench_digits(benchmark: Any, engine: str, method: str) -> None:
    """4 samples of the shipped model, end to end."""
    sampler = Sampler("digits", engine=engine, batch_size=4)

    def draw() -> torch.Tensor:
        return sampler.sample(4, method=method, progress=False)

    expected = Sampler("digits", engine="eager", batch_size=4).sample(
        4, method=method, progress=False
    )
    assert (draw() - expected).abs().max() < 1e-2
    benchmark.pedantic(draw, rounds=2)
    assert sampler.report is not None
    benchmark.extra_info["nfe"] = sampler.report.nfe
