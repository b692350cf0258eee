"""Benchmarks of a network that is not ours: a U-Net from diffusers, providers interleaved."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from providers import _BF16, _FP32, Provider
from race import Absent, Entrant, relative_error
from torch import Tensor, nn

from ncsn_fast import ScoreModel, wrap
from ncsn_fast.engines.cpu.engine import CpuEngine

Run = Callable[[], Tensor]
BATCHES = (1, 8)
_SIGMA = 0.7


def make(batch: int, *, small: bool) -> tuple[ScoreModel, Tensor]:
    """Returns a DDPM-like UNet2DModel for 32x32 images with random weights, and its input."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise Absent(f"package diffusers cannot be imported: {error}") from error
    widths, size = ((32, 64), 8) if small else ((128, 256, 256), 32)
    inner = len(widths) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=size, in_channels=3, out_channels=3, layers_per_block=1 if small else 2,
            norm_num_groups=8, attention_head_dim=8, block_out_channels=widths,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * inner),
            up_block_types=(*["AttnUpBlock2D"] * inner, "UpBlock2D"),
        )  # fmt: skip
    net.eval().requires_grad_(False)
    model = wrap(
        net, predicts="epsilon", sees="log_sigma", image_shape=(3, size, size), sigma_min=0.01,
        sigma_max=1,
    )  # fmt: skip
    return model, torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _seen(model: ScoreModel, x: Tensor) -> Tensor:
    """Returns the network's second input."""
    seen = model.condition(torch.full((len(x),), _SIGMA))
    assert seen is not None
    return seen


def eager(model: ScoreModel, x: Tensor) -> Run:
    """Returns the network as its authors run it."""
    return functools.partial(_without_gradients, model.net, x, _seen(model, x))


def eager_bf16(model: ScoreModel, x: Tensor) -> Run:
    """Returns it after the usual first changes: bfloat16 and channels-last."""
    net = copy.deepcopy(model.net).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    y = x.to(torch.bfloat16, memory_format=torch.channels_last)
    return functools.partial(_without_gradients, net, y, _seen(model, x).to(torch.bfloat16))


def _without_gradients(net: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = net(*inputs)
    return output


def ours(dtype: str) -> Callable[[ScoreModel, Tensor], Run]:
    """Returns a builder of the cpu engine."""

    def build(model: ScoreModel, x: Tensor) -> Run:
        engine = CpuEngine(model, device=torch.device("cpu"), dtype=dtype, batch_size=len(x))

        def run() -> Tensor:
            with engine.context():
                return engine.network(x, _seen(model, x))

        return run

    return build


PROVIDERS = {
    "eager": Provider("as written: eager, NCHW", "fp32", eager, _FP32),
    "eager-bf16": Provider("eager, channels-last", "bf16", eager_bf16, _BF16),
    "ours-fp32": Provider("engine cpu", "fp32", ours("fp32"), _FP32),
    "ours-bf16": Provider("engine cpu", "bf16", ours("bf16"), _BF16),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES)
def bench_unet(race: Callable[..., None], batch: int, provider: str) -> None:
    """Times the network of images given as float32 NCHW, and of one noise level."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        model, x = make(batch, small=settings.small)
        expected = _without_gradients(model.net, x, _seen(model, x))
        return {
            name: functools.partial(_enter, name, model, x, expected) for name in settings.names
        }

    race(builders, f"UNet2DModel of diffusers, 32x32, B = {batch}")


def _enter(name: str, model: ScoreModel, x: Tensor, expected: Tensor) -> Entrant:
    row = PROVIDERS[name]
    row.check()
    run = row.build(model, x)
    info = {"dtype": row.dtype, "summary": row.summary, "batch": len(x)}
    return Entrant(run, lambda: relative_error(run(), expected), row.bound, info)
