"""What needs an NVIDIA GPU: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast import noise, ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_is_the_same_on_the_gpu(kind: str) -> None:
    samples = torch.tensor([0, 3, 2**32 - 1])
    on_cpu = getattr(noise, kind)(7, samples, 1, 5, (3, 5, 7))
    on_gpu = getattr(ops, kind)(7, samples.cuda(), 1, 5, (3, 5, 7)).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=0 if kind == "uniform" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 5, 7), (1, 2, 1, 1)])
def test_sampler_update_matches_the_reference(
    shape: tuple[int, int, int, int], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, f, h, known = (torch.randn(shape) - 2.3 for _ in range(4))
    f = f.to(dtype).to(memory_format=layout)
    options = {
        "seed": 5,
        "samples": torch.arange(shape[0]) + 9,
        "step": 3,
        "noise_weights": torch.rand(shape[0], 2),
        "mask": torch.rand(shape) < 0.3,
        "known": known,
        "c_ref": 0.7,
        "ref_step": 2,
    }
    coefficients = (0.9, 0.3, -0.2, 0.5, 0.1, -0.4)
    expected = reference.sampler_update(x.double(), f, h.double(), coefficients, **options)
    placed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    actual = ops.sampler_update(x.cuda(), f.cuda(), h.cuda(), coefficients, **placed)
    for got, want in zip(actual, expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
