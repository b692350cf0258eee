"""Winograd convolution against PyTorch's, on the 3x3 convolutions of the CIFAR-10 network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ncsn_fast import cpu_ops, reference

# N, in channels, out channels, height and width, dilation.
SHAPES = {
    "8x128x32x32": (8, 128, 128, 32, 1),
    "8x256x16x16": (8, 256, 256, 16, 1),
    "8x256x16x16 dilation 4": (8, 256, 256, 16, 4),
    "8x256x16x16 to 128": (8, 256, 128, 16, 1),
    "1x256x16x16": (1, 256, 256, 16, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", ["torch", "kernel"])
def bench_winograd(benchmark: Any, provider: str, shape: str, dtype: torch.dtype) -> None:
    """Weights packed in advance by both, as an engine does; added to the output, channels-last."""
    n, in_channels, out_channels, size, dilation = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = F.elu(torch.randn(n, in_channels, size, size, generator=generator))
    x = x.to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator)
    weight /= (9 * in_channels) ** 0.5
    bias = torch.randn(out_channels, generator=generator)
    out = x.new_zeros(n, out_channels, size, size).to(memory_format=torch.channels_last)
    exact = (t.double() for t in (x, weight, bias))
    expected = reference.winograd_conv(*exact, dilation=dilation)
    if provider == "kernel":
        weights = cpu_ops.winograd_pack(weight, dtype)

        def run() -> None:
            cpu_ops.winograd_conv_out(x, weights, bias, out, dilation=dilation, accumulate=True)

    else:
        direct, each = torch.ops.mkldnn, [dilation, dilation]
        packed = direct._reorder_convolution_weight(
            weight.to(dtype), each, [1, 1], each, 1, list(x.shape)
        )
        low = bias.to(dtype)

        def run() -> None:
            direct._convolution_pointwise_.binary(
                out, x, packed, low, each, [1, 1], each, 1, "add", None, None, [], None
            )

    with torch.inference_mode():
        run()
        error = (out.double() - expected).norm() / expected.norm()
        assert error <= (2e-6 if dtype is torch.float32 else 5e-3)
        benchmark.extra_info["relative error"] = error.item()
        benchmark.extra_info["flop"] = 18 * n * in_channels * out_channels * size * size
        benchmark(run)
