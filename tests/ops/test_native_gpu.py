"""The extension's CUDA kernels on a GPU: float64, the CPU's bits, graphs."""

import math

import pytest
import torch
from group_norm_cases import options
from torch import Tensor

from ncsn_fast import _C
from ncsn_fast.ops import native, reference
from ncsn_fast.ops.activations import ACTIVATIONS
from ncsn_fast.ops.addresses import NONE, array

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_C.cuda_device_count() == 0, reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA's torch"),
]
FLOATS = tuple(native.DTYPES)


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nhwc(x: Tensor) -> Tensor:
    return x.cuda().contiguous(memory_format=torch.channels_last)


def affine(*shape: int) -> list[Tensor]:
    return [noise_like(*shape, seed=k) * 0.5 + offset for k, offset in enumerate((1, 1, 0.1))]


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((8, 128, 32, 32), "split"), ((8, 128, 32, 32), "single"), ((8, 256, 16, 16), "single"),
        ((8, 256, 16, 16), "split"), ((2, 512, 8, 8), "auto"), ((1, 128, 256, 256), "auto"),
        ((2, 24, 31, 37), "split"), ((2, 37, 7, 11), "single"), ((1, 2000, 3, 5), "auto"),
        ((3, 1, 1, 1), "auto"),
    ],
    ids=str,
)  # fmt: skip
def test_norm_of_real_sizes(shape, form, dtype):
    x, rows = noise_like(*shape).sub(2.3).to(dtype), affine(*shape[:2])
    bias = noise_like(shape[1], seed=7)
    for extra in ({}, {"bias": bias}):
        moved = x.double() + extra["bias"][:, None, None] if extra else x.double()
        exact = reference.instance_norm_plus(moved, *rows, elu=True)
        extra = {name: t.cuda() for name, t in extra.items()}
        ours = native.instance_norm_plus(nhwc(x), *on_gpu(rows), elu=True, form=form, **extra)
        # A mean of N(-2.3, 1) in float32 is a few 2^-24 off; the means' spread is 1 / sqrt(H W).
        floor = 2.0**-19 * math.sqrt(shape[2] * shape[3])
        bound = torch.finfo(dtype).eps * exact.abs().max() + floor
        assert (ours.cpu().double() - exact).abs().max() <= bound
        for _ in range(3):
            again = native.instance_norm_plus(nhwc(x), *on_gpu(rows), elu=True, form=form, **extra)
            assert torch.equal(again, ours)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [64, 24, 13])
def test_group_norm_has_the_bits_of_its_emulation(channels, activation):
    """In float32: the exponential of 16-bit results is the GPU's own."""
    x = (noise_like(3, channels, 33, 31) - 2.3).contiguous(memory_format=torch.channels_last)
    named = options(3, channels, "all")
    emulated, workspace = torch.empty_like(x), native.new_workspace(x)
    arguments = (x, 1, [*named.values()], activation, 1e-5, emulated, workspace)
    _C.emulated_group_norm(*native.group_arguments(*arguments), False)
    rows = {name: row.cuda() for name, row in named.items()}
    ours = native.group_norm(nhwc(x), 1, **rows, activation=activation)
    assert torch.equal(ours.cpu(), emulated)


@pytest.mark.parametrize("form", ["split", "single"])
@pytest.mark.parametrize("channels", [64, 24, 13])
def test_norm_has_the_bits_of_its_emulation(channels, form):
    """Without ELU, whose exponential is the GPU's own in 16 bits."""
    x, rows = noise_like(3, channels, 33, 31) - 2.3, affine(3, channels)
    x = x.contiguous(memory_format=torch.channels_last)
    emulated = torch.empty_like(x)
    partials = torch.empty(native.new_partials(x).shape)
    _C.emulated_instance_norm_plus(
        native._map("x", x), native._map("out", emulated), (3, channels, 33 * 31),
        [native._row("parameter", row) for row in rows], NONE, True, 1e-5,
        array("partials", partials, tuple(partials.shape), torch.float32), form == "single", False,
    )  # fmt: skip
    ours = native.instance_norm_plus(nhwc(x), *on_gpu(rows), elu=True, form=form)
    assert torch.equal(ours.cpu(), emulated)


def some_rows(device: str, steps: int = 4) -> native.Rows:
    table = noise_like(steps, 8, seed=3) * 0.5
    table[1, 3], table[2, 6] = 0.0, math.nan
    indices = torch.arange(2 * steps).reshape(steps, 2) + 2**32 - 2 * steps
    counter = torch.zeros(1, dtype=torch.int32)
    return native.Rows(*(t.to(device) for t in (table, indices, counter)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc8"])
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 3, 61, 67), (3, 1, 28, 28)], ids=str)
def test_update_has_the_bits_of_the_cpu(shape, layout, dtype):
    n, c, height, width = shape
    mask, weights = noise_like(*shape, seed=5) > 0, noise_like(n, 2, seed=8)
    results = []
    for device in ("cpu", "cuda"):
        x, f, h, known = (noise_like(*shape, seed=k).to(device) for k in range(4))
        if layout == "nchw":
            output, net_input = f.to(dtype), torch.zeros(shape, dtype=dtype, device=device)
        else:
            wide = 8 if layout == "nhwc8" else c
            held = torch.full((2, n, height, width, wide), 3.0, dtype=dtype, device=device)
            output, net_input = held[0].permute(0, 3, 1, 2), held[1].permute(0, 3, 1, 2)
            output[:, :c] = f
            output = output[:, :c]
        rows, flags = some_rows(device), torch.zeros(n, dtype=torch.int32, device=device)
        for _ in range(5):  # the last is past the end
            native.sampler_update_(
                x, output, h, rows, seeds=torch.arange(n).to(device) + 2**32 - n,
                samples=torch.arange(n).to(device), noise_weights=weights.to(device),
                mask=mask.to(device), known=known, net_input=net_input, nonfinite=flags,
            )  # fmt: skip
            native.advance(rows)
        results.append([t.cpu() for t in (x, h, net_input, flags)])
    assert all(map(torch.equal, *results))


def test_a_graph_replays_every_row():
    """Norm, update and counter in one captured graph, replayed for each row and new seeds."""
    shape, steps = (4, 8, 16, 16), 4
    parameters = on_gpu(affine(*shape[:2]))
    x, h = (torch.zeros(shape, device="cuda") for _ in range(2))
    net_input, f = (nhwc(torch.zeros(shape).bfloat16()) for _ in range(2))
    partials, rows = native.new_partials(net_input), some_rows("cuda", steps)
    seeds, samples = torch.zeros(4, dtype=torch.int64).cuda(), torch.arange(4).cuda()
    flags = torch.zeros(4, dtype=torch.int32).cuda()

    def step() -> None:
        for form in ("single", "split"):
            native.instance_norm_plus(
                net_input, *parameters, elu=True, out=f, partials=partials, form=form
            )
        native.sampler_update_(
            x, f, h, rows, seeds=seeds, samples=samples, net_input=net_input, nonfinite=flags
        )
        native.advance(rows)

    def reset(seed: int) -> None:
        x.copy_(noise_like(*shape, seed=seed))
        h.zero_()
        net_input.copy_(2 * x - 1)
        seeds.fill_(seed)
        rows.counter.zero_()

    graph = torch.cuda.CUDAGraph()
    reset(0)
    step()
    torch.cuda.synchronize()
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


def test_alignment_is_asked_for():
    x = torch.zeros(8 * 4 + 1, device="cuda")[1:].view(1, 2, 2, 8).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        native.instance_norm_plus(x, *on_gpu(affine(8)))
