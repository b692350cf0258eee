"""What only a device can show of the Triton kernels: real sizes, graphs, other backends' bits."""

import math

import pytest
import torch
from ncsn_fast.kernels.add_elu import elu
from ncsn_fast.kernels.instance_norm_plus import instance_norm_plus
from ncsn_fast.kernels.instance_norm_plus_backward import instance_norm_plus_backward
from ncsn_fast.kernels.norm_statistics import new_partials
from ncsn_fast.kernels.pool5 import max_pool5
from ncsn_fast.kernels.sampler_update import advance, sampler_update, sampler_update_
from program_rows import rows_of
from triton_common import DEVICE, FLOATS, assert_close, nhwc, noise_like

from ncsn_fast import ops
from ncsn_fast.ops import reference

FULL = (0.9, 0.37, -0.21, 0.63, 0.11, -1.3)


def affine(n: int, c: int) -> list[torch.Tensor]:
    values = (noise_like(n, c, seed=k) * 0.5 + offset for k, offset in enumerate((1, 1, 0.1)))
    return [value.to(DEVICE) for value in values]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((8, 128, 32, 32), "split"), ((8, 128, 32, 32), "single"), ((8, 256, 16, 16), "single"),
        ((8, 256, 16, 16), "split"), ((2, 512, 8, 8), "auto"), ((1, 128, 256, 256), "auto"),
        ((2, 24, 31, 37), "split"), ((1, 2000, 3, 5), "auto"),
    ],
    ids=str,
)  # fmt: skip
def test_norm_of_real_sizes(shape, form, dtype):
    x, rows = noise_like(*shape).sub(2.3).to(dtype), affine(*shape[:2])
    exact = reference.instance_norm_plus(x.double(), *(p.cpu() for p in rows), elu=True)
    x = nhwc(x)
    eager = reference.instance_norm_plus(x, *rows, elu=True)
    ours = instance_norm_plus(x, *rows, elu=True, form=form)
    # A mean of N(-2.3, 1) in float32 is a few 2^-24 off; the means' spread is 1 / sqrt(H W).
    pixels = shape[2] * shape[3]
    assert_close(ours, eager, exact, floor=2.0**-20 * math.sqrt(pixels))
    for _ in range(3):
        assert torch.equal(instance_norm_plus(x, *rows, elu=True, form=form), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_real_sizes(dtype):
    x, grad = (noise_like(4, 128, 32, 32, seed=k).sub(1.3).to(dtype) for k in range(2))
    rows = affine(4, 128)
    exact = reference.instance_norm_plus_backward(
        grad.double(), x.double(), *(p.cpu().double() for p in rows), elu=True
    )
    inputs = (nhwc(grad), nhwc(x), *rows)
    eager = reference.instance_norm_plus_backward(*inputs, elu=True)
    for mine, other, truth in zip(
        instance_norm_plus_backward(*inputs, elu=True), eager, exact, strict=True
    ):
        floor = 16 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        assert_close(mine, other, truth, floor)


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 3, 61, 67)], ids=str)
def test_update_has_the_bits_of_the_cpu_kernel(shape):
    n = shape[0]
    x, f, h, known = (noise_like(*shape, seed=k) for k in range(4))
    options = {"noise_weights": noise_like(n, 2, seed=8), "mask": noise_like(*shape, seed=5) > 0}
    options |= {"known": known, "samples": torch.arange(n) + 2**32 - n}
    numbers = {"seed": 2**32 - 1, "step": 77, "c_ref": 0.4, "ref_step": 3}
    expected = ops.sampler_update(x, f, h, FULL, **options, **numbers)
    moved = {name: t.to(DEVICE) for name, t in options.items()}
    state = (t.to(DEVICE) for t in (x, f, h))
    actual = sampler_update(*state, FULL, **moved, **numbers)
    assert torch.equal(actual[0].cpu(), expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])


def test_a_graph_replays_every_row():
    """Norm, pool, update and counter in one captured graph, replayed for each row and new seeds."""
    shape, steps = (4, 8, 16, 16), 5
    table = torch.randn(steps, 8, generator=torch.Generator().manual_seed(3)) * 0.5
    indices = torch.stack((torch.arange(steps), torch.zeros(steps, dtype=torch.int64)), dim=1)
    rows = rows_of(table, torch.full((steps,), math.nan), indices, DEVICE)
    parameters = affine(*shape[:2])
    x, h = (torch.zeros(shape, device=DEVICE) for _ in range(2))
    net_input, normed, f = (nhwc(torch.zeros(shape).bfloat16()) for _ in range(3))
    partials = new_partials(net_input)
    seeds, samples = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.arange(4).to(DEVICE)
    flags = torch.zeros(4, dtype=torch.int32, device=DEVICE)

    def step() -> None:
        instance_norm_plus(
            net_input, *parameters, elu=True, out=normed, partials=partials, form="split"
        )
        max_pool5(normed, out=f)
        sampler_update_(
            x, f, h, rows, seeds=seeds, samples=samples, net_input=net_input, nonfinite=flags
        )
        advance(rows)

    def reset(seed: int) -> None:
        x.copy_(noise_like(*shape, seed=seed))
        h.zero_()
        net_input.copy_(2 * x - 1)
        seeds.fill_(seed)
        rows.counter.zero_()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reset(0)
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (1, 2**32 - 1):
        reset(seed)
        for _ in range(steps):
            step()
        expected = x.clone(), h.clone(), net_input.clone()
        reset(seed)
        for _ in range(steps + 2):  # the last two are past the end
            graph.replay()
        assert rows.counter.item() == steps + 2
        assert all(map(torch.equal, (x, h, net_input), expected))
    assert flags.tolist() == [0, 0, 0, 0]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 16 * 2**30,
    reason="needs 16 GiB of free GPU memory",
)
def test_maps_of_more_than_2_to_31_elements():
    n, c, side = 2049, 1024, 32
    x = torch.empty((n, side, side, c), dtype=torch.bfloat16, device=DEVICE).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x.zero_()
    x[-1] = noise_like(c, side, side).to(DEVICE)
    last, rows = nhwc(x[-1:].clone()), affine(1, c)
    rows = [row[0] for row in rows]
    alone = instance_norm_plus(last, *rows, elu=True), elu(last), max_pool5(last)
    out = torch.empty_like(x)
    instance_norm_plus(x, *rows, elu=True, out=out)
    assert torch.equal(out[-1:], alone[0])
    assert torch.equal(elu(x, out=out)[-1:], alone[1])
    assert torch.equal(max_pool5(x, out=out)[-1:], alone[2])
