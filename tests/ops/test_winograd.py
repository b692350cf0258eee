"""The CPU engine's Winograd convolution against a direct one in float64."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import cpu, reference

LEVELS = _C.isa_levels()
DTYPES = [torch.float32, torch.bfloat16]

# N, in channels, out channels, height, width, dilation.
SHAPES = {
    "whole tiles": (2, 32, 64, 16, 16, 1),
    "more than a chunk of channels": (1, 272, 32, 8, 8, 1),
    "an odd chunk": (1, 131, 33, 8, 8, 1),
    "prime sizes": (2, 37, 41, 13, 7, 1),
    "dilation 2, odd sizes": (2, 19, 35, 11, 14, 2),
    "dilation 4": (1, 48, 40, 16, 16, 4),
    "dilation beyond the map": (2, 17, 9, 3, 2, 5),
    "many blocks of tiles": (3, 16, 16, 33, 30, 1),
    "one pixel": (3, 16, 32, 1, 1, 1),
    "one row": (1, 5, 3, 1, 21, 1),
    "one column": (1, 7, 1, 18, 1, 2),
    "one channel": (2, 1, 1, 6, 5, 1),
    "three channels": (1, 3, 130, 9, 9, 1),
    "no samples": (0, 16, 16, 8, 8, 1),
}


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nhwc(x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    return torch.empty(n, height, width, c, dtype=x.dtype).permute(0, 3, 1, 2).copy_(x)


def case(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """ELU outputs off zero, uneven weights, a bias, and a map to add to."""
    n, in_channels, out_channels, height, width, dilation = SHAPES[name]
    x = nhwc((F.elu(noise_like(n, in_channels, height, width)) + 0.4).to(dtype))
    weight = noise_like(out_channels, in_channels, 3, 3, seed=1) / (9 * in_channels) ** 0.5
    weight = weight * torch.linspace(0.1, 3.0, out_channels)[:, None, None, None]
    bias = noise_like(out_channels, seed=2) - 0.7
    total = nhwc((noise_like(n, out_channels, height, width, seed=3) + 0.3).to(dtype))
    return x, weight, bias, total, dilation


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    out = nhwc(torch.full((len(x), len(weight), *x.shape[2:]), torch.nan, dtype=x.dtype))
    weights = cpu.winograd_pack(weight, x.dtype)
    return cpu.winograd_conv_out(x, weights, bias, out, dilation=dilation)


def relative(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item() if exact.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_error_levels_and_accumulation(name, dtype):
    x, weight, bias, total, dilation = case(name, dtype)
    exact = reference.winograd_conv(x.double(), weight.double(), bias.double(), dilation=dilation)
    eager = reference.winograd_conv(x, weight.to(dtype), bias.to(dtype), dilation=dilation)
    ours = convolve(x, weight, bias, dilation)
    # In bfloat16 better than a direct convolution, where rounding of the output allows it.
    bound = 2e-6 if dtype is torch.float32 else 1.1 * relative(eager, exact) + 2e-4
    assert relative(ours, exact) <= bound
    without = convolve(x, weight, None, dilation)
    assert relative(without, exact - bias.double()[:, None, None]) <= max(bound, 3e-3)

    weights = cpu.winograd_pack(weight, dtype)
    for level in LEVELS:
        with ops.isa(level):
            assert torch.equal(convolve(x, weight, bias, dilation), ours), level
            added = total.clone()
            result = cpu.winograd_conv_out(
                x, weights, bias, added, dilation=dilation, accumulate=True
            )
        assert result is added
        assert relative(added, total.double() + exact) <= (2e-6 if bound == 2e-6 else 3e-3), level


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_independent_of_threads_and_batch(dilation, dtype, set_threads):
    x = nhwc(F.elu(noise_like(5, 40, 21, 18)).to(dtype))
    weight, bias = noise_like(70, 40, 3, 3, seed=1), noise_like(70, seed=2)
    set_threads(1)
    whole = convolve(x, weight, bias, dilation)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        assert torch.equal(convolve(x, weight, bias, dilation), whole)
        for i in (0, 3):
            assert torch.equal(convolve(x[i : i + 1], weight, bias, dilation), whole[i : i + 1])
    mixed = nhwc(torch.cat((x[4:] * 1e4, x[2:3])))
    assert torch.equal(convolve(mixed, weight, bias, dilation)[1:], whole[2:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_gives_the_mirrored_weights(dtype):
    """At every place of a tile, and in no other output channel."""
    for at in range(9):
        x = nhwc(torch.zeros(1, 16, 9, 9).to(dtype))
        x[0, 3, at, (2 * at) % 9] = 4.0
        weight = torch.zeros(2, 16, 3, 3)
        weight[1, 3] = torch.arange(1.0, 10.0).view(3, 3)
        y = convolve(x, weight, None)
        exact = F.conv2d(x.float(), weight, padding=1)
        assert (y[:, 0] == 0).all()
        error = (y.double() - exact).abs().max()
        assert error <= (1e-5 if dtype is torch.float32 else 4e-3) * exact.max()


def test_sums_stay_within_32_bits():
    """The largest integers everywhere, all of one sign: the bound of the scales is reached."""
    for channels in (16, 128, 256):
        x = nhwc(torch.full((1, channels, 12, 12), 3.0).bfloat16())
        x[..., ::2, 1::2] = -3.0
        weight = torch.full((3, channels, 3, 3), 0.25)
        weight[1, :, ::2, 1::2] = -0.25
        weight[2] = noise_like(channels, 3, 3).sign()
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        assert (convolve(x, weight, None) - exact).abs().max() <= 4e-3 * exact.abs().max()


@pytest.mark.parametrize("factor", [1e-25, 1e-4, 512.0, 1e25])
def test_any_amplitude(factor):
    x, weight, _, _, _ = case("prime sizes", torch.bfloat16)
    scaled = (x.double() * factor).bfloat16()
    exact = F.conv2d(scaled.double(), weight.double(), padding=1)
    assert relative(convolve(nhwc(scaled), weight, None), exact) <= 3e-3
    small = convolve(nhwc(scaled), weight * 1e-6, None)
    assert relative(small, exact * 1e-6) <= 3e-3


def test_amplitudes_that_differ_between_channels():
    spread = torch.logspace(-1, 1, 64).roll(17)
    x = nhwc((F.elu(noise_like(2, 64, 16, 16)) * spread[:, None, None]).bfloat16())
    weight = noise_like(48, 64, 3, 3, seed=1)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    direct = F.conv2d(x, weight.bfloat16(), padding=1)
    assert relative(convolve(x, weight, None), exact) <= 1.1 * relative(direct, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_inputs_are_seen_and_stay_in_reach(value, dtype):
    x = nhwc(F.elu(noise_like(2, 24, 16, 16)).to(dtype))
    weight = noise_like(40, 24, 3, 3, seed=1)
    clean = convolve(x, weight, None)
    x[1, 5, 6, 7] = value
    for level in LEVELS:
        with ops.isa(level):
            y = convolve(x, weight, None)
        assert torch.equal(y[0], clean[0])
        assert not y[1, :, 5:8, 6:9].isfinite().any()
        assert torch.equal(y[1, :, 12:], clean[1, :, 12:])


def test_zero_map_and_zero_weights():
    x = nhwc(torch.zeros(1, 20, 7, 7).bfloat16())
    bias = noise_like(9)
    for weight in (noise_like(9, 20, 3, 3), torch.zeros(9, 20, 3, 3)):
        y = convolve(x, weight, bias)
        assert torch.equal(y, bias.bfloat16()[:, None, None].expand_as(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 37, 131])
def test_neighbouring_memory_is_left_alone(channels, dtype):
    room = torch.full((4, 6, 7, channels), 77.0, dtype=dtype)
    out = room[1:3].permute(0, 3, 1, 2)
    x = nhwc(noise_like(2, 5, 6, 7).to(dtype))
    weights = cpu.winograd_pack(noise_like(channels, 5, 3, 3), dtype)
    for level in LEVELS:
        with ops.isa(level):
            cpu.winograd_conv_out(x, weights, None, out, dilation=2)
        assert (room[[0, 3]] == 77.0).all()


def test_maps_without_pixels():
    for shape in ((2, 4, 0, 5), (2, 4, 5, 0)):
        x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        out = cpu.winograd_conv_out(x, PACKED, None, x.new_empty(2, 5, *shape[2:]))
        assert out.shape == (2, 5, *shape[2:])


def test_bfloat16_weights_are_taken_as_they_are():
    weight = noise_like(8, 8, 3, 3).bfloat16()
    for dtype in DTYPES:
        one, other = (cpu.winograd_pack(w, dtype) for w in (weight, weight.float()))
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize(
    ("sizes", "pays"),
    [
        ((128, 128, 32, 32, 1), True),
        ((256, 256, 16, 16, 4), True),
        ((256, 256, 8, 8, 2), True),
        ((256, 256, 8, 8, 4), False),
        ((128, 128, 6, 6, 1), True),
        ((128, 128, 5, 5, 1), False),
        ((128, 128, 1, 1, 1), False),
        ((128, 128, 0, 8, 1), False),
        ((3, 128, 32, 32, 1), False),
        ((128, 3, 32, 32, 1), False),
    ],
)
def test_where_it_pays(sizes, pays):
    assert cpu.winograd_pays(*sizes) is pays


MAP = nhwc(noise_like(2, 4, 6, 6))
WEIGHT = noise_like(5, 4, 3, 3)
PACKED = cpu.winograd_pack(WEIGHT, torch.float32)
OUT = nhwc(noise_like(2, 5, 6, 6))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cpu.winograd_pack(noise_like(4, 4, 1, 1), torch.float32), ValueError, "3, 3"),
        (lambda: cpu.winograd_pack(WEIGHT[:0], torch.float32), ValueError, r"got \(0, 4, 3, 3"),
        (lambda: cpu.winograd_pack(WEIGHT.double(), torch.float32), TypeError, "float64"),
        (lambda: cpu.winograd_pack(WEIGHT, torch.float16), TypeError, "got .*float16"),
        (lambda: cpu.winograd_pack(WEIGHT.to("meta"), torch.float32), ValueError, "on meta"),
        (lambda: cpu.winograd_pack(WEIGHT / 0, torch.float32), ValueError, "must be finite"),
        (
            lambda: cpu.winograd_conv_out(MAP.bfloat16(), PACKED, None, OUT.bfloat16()),
            TypeError,
            "packed for torch.float32 maps; x is torch.bfloat16",
        ),
        (lambda: cpu.winograd_conv_out(OUT, PACKED, None, OUT), ValueError, "4 channels; got"),
        (lambda: cpu.winograd_conv_out(MAP, PACKED, None, MAP), ValueError, "out must have"),
        (
            lambda: cpu.winograd_conv_out(MAP, PACKED, None, OUT.contiguous()),
            ValueError,
            "out must be channels-last",
        ),
        (
            lambda: cpu.winograd_conv_out(MAP, PACKED, None, OUT, dilation=0),
            ValueError,
            "at least 1; got 0",
        ),
        (
            lambda: cpu.winograd_conv_out(MAP, PACKED, WEIGHT[0, 0, 0], OUT),
            ValueError,
            r"shape \(5,\); got \(3,\)",
        ),
        (
            lambda: cpu.winograd_conv_out(MAP, PACKED, torch.zeros(5).double(), OUT),
            TypeError,
            "bias must be torch.float32; got torch.float64",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_refuses_an_output_within_the_input():
    square = cpu.winograd_pack(noise_like(4, 4, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="lie apart from x"):
        cpu.winograd_conv_out(MAP, square, None, MAP)


@pytest.mark.skipif(
    "avx2_vnni" not in _C.build_info()["isa_levels"], reason="built for another processor"
)
def test_avx_vnni_needs_no_avx512():
    """Where this processor has AVX-512 instead, the level runs the same sums by its encoding.

    vpdpwssd of 256 bits in the encoding VEX: C4, a byte of map 2, one with W = 0, L = 1 and the
    prefix 66, then opcode 52; no test can run it on a processor without AVX-VNNI.
    """
    code = Path(_C.__file__).read_bytes()
    found = re.findall(rb"\xc4[\x02\x22\x42\x62\x82\xa2\xc2\xe2](.)\x52", code, re.DOTALL)
    kernels = 6  # for 1 to 6 tiles; each sum is written out in them only if the compiler optimises
    assert sum(byte[0] & 0x87 == 0x05 for byte in found) >= kernels
