"""Tensors filled with the noise of the contract, in Triton."""

import philox_numpy
import pytest
import torch
from ncsn_fast.kernels.fill import normal_, uniform_
from torch import Tensor
from triton_common import DEVICE, INTERPRETED

from ncsn_fast import ops
from ncsn_fast.ops import noise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy: words wrap

SEED, STREAM, STEP = 2**32 - 1, 1, 77


def key(n: int) -> tuple[Tensor, Tensor]:
    samples = torch.tensor([2**32 - 1, 5, 0, 17])[:n].to(DEVICE)
    return torch.full_like(samples, SEED), samples


def filled(fill, *shape: int, stream: int = STREAM, step: int = STEP) -> Tensor:
    out = torch.full(shape, torch.nan, device=DEVICE)
    assert fill(out, *key(shape[0]), stream=stream, step=step) is out
    return out


# Several blocks, the last one cut; a part of a quadruple; one element; one axis.
@pytest.mark.parametrize("shape", [(2, 3, 17, 29), (3, 2, 1, 3), (1, 1, 1, 1), (4, 64)], ids=str)
def test_every_element(shape):
    samples = key(shape[0])[1].cpu()
    expected = noise.uniform(SEED, samples, STREAM, STEP, shape[1:])
    assert torch.equal(filled(uniform_, *shape).cpu(), expected)
    normals = filled(normal_, *shape).cpu()
    if not INTERPRETED:  # the interpreter rounds products that a device fuses
        assert torch.equal(normals, ops.normal(SEED, samples, STREAM, STEP, shape[1:]))
    exact = noise.normal(SEED, samples, STREAM, STEP, shape[1:])
    assert philox_numpy.ulp_distance(normals.numpy(), exact.numpy()).max() <= 4


@pytest.mark.parametrize(("stream", "step"), [(0, 1), (1, 2**31 - 1), (2**31, 2**32 - 1)])
def test_streams_and_steps_of_32_bits(stream, step):
    expected = noise.uniform(SEED, key(2)[1].cpu(), stream, step, (40,))
    assert torch.equal(filled(uniform_, 2, 40, stream=stream, step=step).cpu(), expected)


def test_each_sample_has_its_own_seed():
    seeds, samples = torch.tensor([3, 2**32 - 1], device=DEVICE), key(2)[1]
    both = uniform_(torch.empty(2, 8, device=DEVICE), seeds, samples, stream=0, step=0).cpu()
    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(
            both[i : i + 1], noise.uniform(seed, samples[i : i + 1].cpu(), 0, 0, (8,))
        )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0)])
def test_empty(shape):
    assert filled(normal_, *shape).shape == shape


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"out": torch.empty(2, 3).half()}, "float32, contiguous"),
        ({"out": torch.empty(2, 6)[:, ::2]}, r"strides \(6, 2\)"),
        ({"samples": torch.arange(3)}, r"samples must be contiguous, torch.int64, of shape \(2,\)"),
        ({"seeds": torch.zeros(2)}, "seeds must be.*torch.float32"),
        ({"step": 2**32}, "step must be in"),
        ({"stream": -1}, "stream must be in"),
    ],
)
def test_refusals(change, text):
    arguments = {"out": torch.empty(2, 3), "seeds": torch.zeros(2, dtype=torch.int64)}
    arguments |= {"samples": torch.arange(2), "stream": 0, "step": 0} | change
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=text):
        uniform_(**moved)
