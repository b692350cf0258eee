"""The CUDA kernels of group normalisation, run phase by phase on the CPU."""

import pytest
import torch
from cross_section import cross_section
from group_norm_cases import GROUPS, VARIANTS, options, slack
from norm_cases import INPUTS, noise_like, worst
from torch import Tensor

from ncsn_fast import _C
from ncsn_fast.ops import native, reference
from ncsn_fast.ops.activations import ACTIVATIONS
from ncsn_fast.ops.native import DTYPES

FLOATS = tuple(DTYPES)
# Vectors, blocks and tiles of these, and more channels in a group than its block has threads.
MORE = {
    "whole vectors": (lambda: noise_like(2, 16, 8, 8) - 2.3, 4),
    "three vectors": (lambda: noise_like(2, 24, 9, 9) * 1.7 - 2.3, 8),
    "uneven blocks": (lambda: noise_like(1, 200, 5, 13) - 2.3, 2),
    "several tiles of vectors": (lambda: noise_like(1, 8, 67, 71) - 2.3, 2),
    "most tiles": (lambda: noise_like(1, 3, 181, 191) - 2.3, 3),
    "large offset of many tiles": (lambda: noise_like(1, 64, 96, 96) + 1e3, 32),
    "2003 channels": (lambda: noise_like(2, 2003, 2, 3) - 2.3, 1),
    "2048 channels": (lambda: noise_like(1, 2048, 4, 4) - 2.3, 32),
}
CASES = {name: (make, GROUPS[name]) for name, make in INPUTS.items()} | MORE


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def emulated(
    x: Tensor,
    groups: int,
    *,
    activation: str = "none",
    out: Tensor | None = None,
    backward: bool = False,
    **named: Tensor,
) -> Tensor:
    """What the CUDA kernels give for a channels-last x."""
    out = torch.empty_like(x) if out is None else out
    partials, coefficients = (t.fill_(torch.nan) for t in native.new_workspace(x))
    rows = [named.get(name) for name in ("gamma", "beta", "add", "scale", "shift")]
    workspace = (partials, coefficients)
    arguments = native.group_arguments(x, groups, rows, activation, 1e-5, out, workspace)
    _C.emulated_group_norm(*arguments, backward)
    return out


@pytest.mark.parametrize(
    ("name", "dtype", "variant", "activation"),
    cross_section(list(CASES), FLOATS, VARIANTS, ("none", "silu", "gelu")),
)
def test_within_twice_eager(name, dtype, variant, activation):
    make, groups = CASES[name]
    x = nhwc(make().to(dtype))
    named = options(*x.shape[:2], variant)
    exact = reference.group_norm(x.double(), groups, **named, activation=activation)
    eager = reference.group_norm(x, groups, **named, activation=activation)
    ours = emulated(x, groups, **named, activation=activation)
    # Two roundings of the largest output.
    floor = 2 * torch.finfo(dtype).eps * exact.abs().max().item() + slack(x, groups, named)
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [16, 6])
def test_every_activation(channels, activation, dtype):
    x = nhwc((noise_like(2, channels, 5, 7) * 3).to(dtype))
    named = options(2, channels, "modulated") | {"activation": activation}
    exact = reference.group_norm(x.double(), 2, **named)
    bound = torch.finfo(dtype).eps * max(exact.abs().max().item(), 1.0)
    assert worst(emulated(x, 2, **named), exact) <= bound + 4e-6


def test_agrees_with_the_cpu_kernel():
    x, named = nhwc(noise_like(3, 40, 11, 13) - 2.3), options(3, 40, "all")
    ours = emulated(x, 8, **named, activation="silu")
    cpu = native.group_norm(x, 8, **named, activation="silu")
    torch.testing.assert_close(ours, cpu, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (2, 7, 9, 7), (1, 8, 67, 71)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_order_of_threads_does_not_matter(dtype, shape):
    x, named = nhwc((noise_like(*shape) - 2.3).to(dtype)), options(*shape[:2], "all")
    forward, backward = (emulated(x, 1, **named, backward=b) for b in (False, True))
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("channels", [16, 12, 13])
def test_independent_of_batch_and_place(channels):
    x, named = noise_like(4, channels, 9, 7) - 2.3, options(4, channels, "all")

    def run(part):
        rows = {k: p[part].contiguous() if p.ndim == 2 else p for k, p in named.items()}
        return emulated(nhwc(x[part]), 1, **rows, activation="silu")

    y = run(slice(None))
    for i in (0, 3):
        assert torch.equal(run(slice(i, i + 1)), y[i : i + 1])
    assert torch.equal(run([3, 2, 1, 0]).flip(0), y)


@pytest.mark.parametrize("channels", [16, 6])
def test_nan_stays_in_its_group(channels):
    x = nhwc(noise_like(3, channels, 5, 5))
    clean = emulated(x, 2, activation="silu")
    x[1, 1, 3, 4] = float("nan")
    y = emulated(x, 2, activation="silu")
    assert y[1, : channels // 2].isnan().all()
    assert torch.equal(y[1, channels // 2 :], clean[1, channels // 2 :])
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("value", [0.1, -2.3, 1e3, 1e-30])
@pytest.mark.parametrize("channels", [16, 6])
def test_constant_groups_give_beta_exactly(channels, value):
    x, named = nhwc(torch.full((2, channels, 33, 35), value)), options(2, channels, "affine")
    named["gamma"] *= 2.0**40  # a variance that is not 0 would show
    y = emulated(x, 2, **named)
    assert torch.equal(y, named["beta"][:, None, None].expand_as(y))


@pytest.mark.parametrize("activation", ["none", "silu", "elu"])
@pytest.mark.parametrize("channels", [8, 12, 7])
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_every_pair_of_types(of, to, channels, activation):
    x = nhwc((noise_like(2, channels, 5, 7) - 2.3).to(of))
    named = options(2, channels, "all") | {"activation": activation}
    out = torch.full_like(x, float("nan"), dtype=to)
    emulated(x, 1, out=out, **named)
    exact = reference.group_norm(x.double(), 1, **named)
    assert worst(out, exact) <= torch.finfo(to).eps * exact.abs().max() + 4e-6


@pytest.mark.parametrize("activation", ["none", "silu", "tanh"])
@pytest.mark.parametrize("channels", [8, 7])
def test_in_place(channels, activation):
    x, named = nhwc(noise_like(2, channels, 17, 9)), options(2, channels, "all")
    expected = emulated(x, 1, **named, activation=activation)
    emulated(x, 1, **named, activation=activation, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_over_its_whole_range(dtype):
    z = torch.cat((-torch.logspace(-8, 2, 511), torch.tensor([0.0])))
    x = torch.stack((z, -z)).reshape(1, 1, 2, 512).expand(1, 8, 2, 512)
    gamma = (x.double().var(dim=(0, 2, 3), correction=0) + 1e-5).sqrt().float()
    named = {"gamma": gamma, "beta": torch.zeros(8)}
    linear = emulated(nhwc(x), 8, **named)
    exact = linear.double() * torch.sigmoid(linear.double())
    out = torch.empty_like(linear, dtype=dtype)
    error = (emulated(nhwc(x), 8, **named, activation="silu", out=out).double() - exact).abs()
    # the smallest normal number is where the spacing of float16 stops to shrink
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert (error <= (2.0 if dtype is torch.float32 else 1.0) * spacing + 2.0**-115).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_written_beyond_the_map(dtype):
    for channels in (8, 13):
        x = nhwc(noise_like(3, channels, 5, 7).to(dtype))
        buffer = torch.full((x.numel() + 128,), 7.0, dtype=dtype)
        out = buffer[64:-64].view(3, 5, 7, channels).permute(0, 3, 1, 2)
        emulated(x, 1, activation="silu", out=out)
        assert torch.equal(out, emulated(x, 1, activation="silu"))
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4)], ids=str)
def test_empty(shape):
    assert emulated(nhwc(torch.empty(shape)), 2).shape == shape


def test_what_the_kernels_refuse():
    x = nhwc(torch.zeros(1, 8, 2, 2))
    partials, coefficients = native.new_workspace(x)
    with pytest.raises(ValueError, match=r"partials .use new_workspace.*must have shape"):
        native.group_arguments(x, 2, [None] * 5, "none", 1e-5, x, (partials[0], coefficients))
    with pytest.raises(ValueError, match="divide the 8 channels"):
        native.group_norm(x, 3)
    with pytest.raises(TypeError, match="float16"):
        native.group_norm(x.half(), 2)
    shifted = torch.zeros(8 * 4 + 1)[1:].view(1, 2, 2, 8).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        emulated(shifted, 2)
