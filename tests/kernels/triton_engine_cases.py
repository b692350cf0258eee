"""The engine for GPUs with its Triton kernels, whole: in the interpreter, convolutions by torch."""

import dataclasses

import own_networks
import pytest
import torch
from engine_cases import chains_of, program_of, small
from triton_common import DEVICE

from ncsn_fast.engines import precision
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.samplers.program_transforms import inpainting, interpolation_weights


def engine(of, dtype="fp32", kind=CudaEngine):
    return kind(of, device=torch.device(DEVICE), dtype=dtype, batch_size=2)


@pytest.mark.parametrize(
    ("dtype", "conditional"), [("fp32", False), ("fp32", True), ("fp16", False), ("bf16", False)]
)
def test_the_network_is_within_its_bound(dtype, conditional):
    built = engine(small(conditional), dtype)
    assert 0 < built.error <= precision.BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_users_network_is_within_its_bound(dtype):
    """Group norms, weighted sums and activations of Triton's, between what PyTorch runs."""
    built = engine(own_networks.model("classes"), dtype)
    assert 0 < built.error <= precision.BOUNDS[dtype]
    kinds = {cost.kind for cost in built.loop((8, 8)).plan.costs}
    assert {"group_norm", "pointwise", "mean_pool2"} < kinds
    assert any(kind.endswith("(torch)") for kind in kinds)


def test_a_run_is_that_of_the_reference():
    """Known pixels, second noise and history in every row, and the counter between them."""
    of = small()
    program = inpainting(program_of(of, n_steps_each=1), "ncsnv2")
    momentum = torch.linspace(-0.2, 0.2, program.nfe, dtype=torch.float64).numpy()
    program = dataclasses.replace(program, g=momentum, p=0.3 * momentum, q=momentum)
    results = []
    for built in (engine(of), engine(of, kind=EagerEngine)):
        chains = chains_of(of, device=torch.device(DEVICE))
        generator = torch.Generator().manual_seed(1)
        chains.mask = (torch.rand(chains.x.shape, generator=generator) > 0.6).to(DEVICE)
        chains.known = torch.rand(chains.x.shape, generator=generator).to(DEVICE)
        chains.noise_weights = interpolation_weights(2).float().to(DEVICE)
        results.append((built.run(program, chains), chains.h))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=2e-3)
    assert chains.x.abs().max() > 0.5


@pytest.mark.skipif(DEVICE != "cpu", reason="TensorRT's double computes on the CPU")
def test_our_update_between_calls_of_tensorrt(monkeypatch, tmp_path):
    import trt_cases

    trt_cases.install(monkeypatch, tmp_path, "11.4")
    of = small(conditional=True)
    program = program_of(of, n_steps_each=2)
    built = trt_cases.engine(of, kernels="triton")
    ours, expected = (e.run(program, chains_of(of)) for e in (built, engine(of, kind=EagerEngine)))
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=2e-3)
