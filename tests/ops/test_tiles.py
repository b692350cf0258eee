"""Convolution in tiles against a direct one in float64, at every level: real or emulated."""

import re

import pytest
import torch
import torch.nn.functional as F
from tile_cases import SHAPES, case, empty, excess, nhwc, noise_like, relative
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import extension, reference, tiles
from ncsn_fast.ops.activations import ACTIVATIONS

LEVELS = _C.isa_levels()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    out = empty(x, len(weight))
    tiles.tile_conv_out(x, tiles.tile_pack(weight), bias, total=out, dilation=dilation)
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_error_and_levels(name):
    """No worse than float32 sums that are rounded once; the same bits at every level."""
    x, weight, bias, added, dilation = case(name)
    args = (x.double(), weight.double(), bias.double(), added.double())
    exact = reference.tile_conv(*args, dilation=dilation)
    curved = reference.tile_conv(*args, dilation=dilation, activation="elu")
    packed, results = tiles.tile_pack(weight), []
    for level in LEVELS:
        total, out = empty(x, len(weight)), empty(x, len(weight))
        with ops.isa(level):
            tiles.tile_conv_out(
                x, packed, bias, added=added, total=total, out=out, dilation=dilation,
                activation="elu",
            )  # fmt: skip
        results.append((total, out))
    for (total, out), level in zip(results, LEVELS, strict=True):
        assert torch.equal(total, results[0][0]), level
        assert torch.equal(out, results[0][1]), level
    total, out = results[0]
    once = 1.02 * relative(exact.bfloat16(), exact) + 1e-5
    assert relative(total, exact) <= once
    assert relative(out, curved) <= 1.02 * relative(curved.bfloat16(), curved) + 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_every_element_is_as_near_as_sums_in_float32_allow(name):
    """Then each is rounded to bfloat16 once; no channel, border or tile is an exception."""
    x, weight, bias, added, dilation = case(name)
    total = empty(x, len(weight))
    tiles.tile_conv_out(
        x, tiles.tile_pack(weight), bias, added=added, total=total, dilation=dilation
    )
    assert excess(total, x, weight, bias, added, dilation=dilation) <= 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, weight, bias, added, dilation = case("tiles that wrap")
    exact = reference.tile_conv(
        x.double(), weight.double(), bias.double(), added.double(), dilation=dilation,
        activation=activation,
    )  # fmt: skip
    out = empty(x, len(weight))
    tiles.tile_conv_out(
        x, tiles.tile_pack(weight), bias, added=added, out=out, activation=activation
    )
    assert relative(out, exact) <= 1.05 * relative(exact.bfloat16(), exact) + 1e-5


def test_what_is_written():
    """Sum, activation or both; with and without bias and map; in place of the map, or not."""
    x, weight, bias, added, _ = case("prime sizes")
    packed = tiles.tile_pack(weight)
    for offsets in (None, bias):
        for other in (None, added):
            total, out = empty(x, len(weight)), empty(x, len(weight))
            options = {"added": other, "activation": "silu"}
            tiles.tile_conv_out(x, packed, offsets, total=total, out=out, **options)
            exact = reference.tile_conv(
                *(None if t is None else t.double() for t in (x, weight, offsets, other))
            )
            assert relative(total, exact) <= 3e-3
            for name, expected in (("total", total), ("out", out)):
                alone = empty(x, len(weight))
                tiles.tile_conv_out(x, packed, offsets, **{name: alone}, **options)
                assert torch.equal(alone, expected)
                if other is not None:
                    place = other.clone()
                    tiles.tile_conv_out(
                        x, packed, offsets, **{name: place}, added=place, activation="silu"
                    )
                    assert torch.equal(place, expected)


def test_a_delta_gives_the_mirrored_weights():
    """At every place of a tile, and in no other output channel."""
    for height, width in ((9, 9), (9, 16)):
        for at in range(9):
            x = nhwc(torch.zeros(1, 33, height, width).bfloat16())
            x[0, 32, at, (2 * at) % 9] = 4.0
            weight = torch.zeros(34, 33, 3, 3)
            weight[33, 32] = torch.arange(1.0, 10.0).view(3, 3)
            y = convolve(x, weight, None)
            assert torch.equal(y.float(), F.conv2d(x.float(), weight, padding=1))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "dilation"), [(16, 1), (16, 4), (10, 1), (10, 2)])
def test_independent_of_threads_and_batch(width, dilation, set_threads):
    x = nhwc(F.elu(noise_like(5, 40, 21, width)).bfloat16())
    weight, bias = noise_like(100, 40, 3, 3, seed=1), noise_like(100, seed=2)
    set_threads(1)
    whole = convolve(x, weight, bias, dilation)
    for threads in (2, 3, 7):
        set_threads(threads)
        assert torch.equal(convolve(x, weight, bias, dilation), whole)
        for i in (0, 3):
            assert torch.equal(convolve(x[i : i + 1], weight, bias, dilation), whole[i : i + 1])
    x[:4] *= 1e4
    assert torch.equal(convolve(x, weight, bias, dilation)[4:], whole[4:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [16, 11])
def test_nonfinite_inputs_reach_their_window_and_no_more(value, width):
    x = nhwc(F.elu(noise_like(2, 24, 16, width)).bfloat16())
    weight = noise_like(40, 24, 3, 3, seed=1)
    clean = convolve(x, weight, None)
    x[1, 5, 6, 0] = value
    y = convolve(x, weight, None)
    assert not y[1, :, 5:8, :2].isfinite().any()
    y[1, :, 5:8, :2] = clean[1, :, 5:8, :2]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("channels", [3, 37, 131])
def test_neighbouring_memory_is_left_alone(channels):
    room = torch.full((4, 6, 7, channels), 77.0, dtype=torch.bfloat16)
    out = room[1:3].permute(0, 3, 1, 2)
    x = nhwc(noise_like(2, 5, 6, 7).bfloat16())
    weights = tiles.tile_pack(noise_like(channels, 5, 3, 3))
    for level in LEVELS:
        with ops.isa(level):
            tiles.tile_conv_out(x, weights, total=out, dilation=2)
        assert (room[[0, 3]] == 77.0).all()


def test_maps_without_pixels():
    for shape in ((2, 4, 0, 5), (2, 4, 5, 0)):
        x = torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        tiles.tile_conv_out(x, PACKED, total=x.new_empty(2, 5, *shape[2:]))


def test_weights_are_rounded_to_nearest():
    weight = noise_like(8, 8, 3, 3)
    one, other = (tiles.tile_pack(w) for w in (weight, weight.bfloat16()))
    assert torch.equal(one.values, other.values)


MAP = nhwc(noise_like(2, 4, 6, 6).bfloat16())
WEIGHT = noise_like(5, 4, 3, 3)
PACKED = tiles.tile_pack(WEIGHT)
OUT = nhwc(noise_like(2, 5, 6, 6).bfloat16())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tiles.tile_pack(noise_like(4, 4, 5, 5)), ValueError, "3, 3"),
        (lambda: tiles.tile_pack(WEIGHT[:0]), ValueError, r"got \(0, 4, 3, 3"),
        (lambda: tiles.tile_pack(WEIGHT.double()), TypeError, "float64"),
        (lambda: tiles.tile_pack(WEIGHT.to("meta")), ValueError, "on meta"),
        (lambda: tiles.tile_pack(WEIGHT / 0), ValueError, "must be finite"),
        (
            lambda: tiles.tile_conv_out(MAP.float(), PACKED, total=OUT),
            TypeError,
            "bfloat16 here",
        ),
        (lambda: tiles.tile_conv_out(OUT, PACKED, total=OUT), ValueError, "4 channels; got"),
        (lambda: tiles.tile_conv_out(MAP, PACKED, total=MAP), ValueError, "total must have"),
        (lambda: tiles.tile_conv_out(MAP, PACKED), ValueError, "neither was given"),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED, total=OUT, out=OUT),
            ValueError,
            "out of shape .* must lie apart from total",
        ),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED, added=OUT[:1], total=OUT),
            ValueError,
            "added must have",
        ),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED, total=OUT.contiguous()),
            ValueError,
            "total must be channels-last",
        ),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED, total=OUT, dilation=0),
            ValueError,
            "at least 1; got 0",
        ),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED, WEIGHT[0, 0, 0], total=OUT),
            ValueError,
            r"shape \(5,\); got \(3,\)",
        ),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED, total=OUT, activation="sine"),
            ValueError,
            "activation must be one of",
        ),
        (
            lambda: tiles.tile_conv_out(MAP, PACKED._replace(taps=1), total=OUT),
            ValueError,
            "values must have shape",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_refuses_an_output_within_the_input():
    square = tiles.tile_pack(noise_like(4, 4, 3, 3))
    with pytest.raises(ValueError, match="lie apart from x"):
        tiles.tile_conv_out(MAP, square, total=MAP)


STATES = {
    (False, False, False, 0): "this build has no kernels for it",
    (True, False, False, 0): "this processor has none",
    (True, True, False, 0): "the system has not enabled it: it needs Linux 5.16",
    (True, True, True, 22): r"no permission \(arch_prctl: EINVAL, .*\): it needs Linux 5.16",
    (True, True, True, 1): r"no permission \(arch_prctl: EPERM, .*a sandbox that allows the call",
}


@pytest.mark.parametrize("state", STATES)
def test_why_amx_is_not_used_is_said(state, monkeypatch):
    monkeypatch.setattr(tiles, "_C", FakeExtension(state))
    assert re.fullmatch(f"not used: .*{STATES[state]}.*", tiles.state())


def test_where_amx_can_be_used_the_level_decides(monkeypatch):
    monkeypatch.setattr(tiles, "_C", FakeExtension((True, True, True, 0)))
    for level, said in (("amx", "used"), ("avx512", "not used: the level is avx512")):
        monkeypatch.setattr(tiles, "default_isa", lambda level=level: level)
        assert tiles.state() == said


class FakeExtension:
    """What the extension says of another machine."""

    def __init__(self, state: tuple[bool, bool, bool, int]) -> None:
        self.amx_state = lambda: state


def test_the_state_agrees_with_the_levels():
    assert ("amx" in LEVELS) == (tiles.problem() is None)
    assert (_C.default_isa() == "amx") == (tiles.problem() is None)
    assert ("amx" in _C.build_info()["isa_levels"]) == _C.amx_state()[0]


def test_the_emulation_is_a_level_that_every_machine_has():
    assert tiles.level() == (extension.default_isa() if "amx" in extension.default_isa() else None)
    with ops.isa("amx_emulated"):
        assert tiles.level() == "amx_emulated"
        x = nhwc(noise_like(1, 32, 6, 6).bfloat16())
        y = convolve(x, noise_like(32, 32, 3, 3), None)
    assert torch.equal(convolve(x, noise_like(32, 32, 3, 3), None), y)
    with ops.isa("scalar"):
        assert tiles.level() is None
