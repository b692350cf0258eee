"""What a convolution in tiles leaves for the norm after it, and maps that are padded before it."""

import pytest
import torch
import torch.nn.functional as F
from tile_cases import SHAPES, case, empty, nhwc, noise_like, relative
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import addresses, extension, reference, tiles
from ncsn_fast.ops.activations import activation_code

LEVELS = _C.isa_levels()


def empty_sums(x: Tensor, channels: int) -> Tensor:
    shape = tiles.Strips.of(*x.shape[2:]).sums_shape(len(x), channels)
    return torch.full(shape, torch.nan)


def convolve_with_sums(
    x: Tensor | tiles.Padded, weight: Tensor, bias: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    like = x.pixels if isinstance(x, tiles.Padded) else x
    total, sums = empty(like, len(weight)), empty_sums(like, len(weight))
    tiles.tile_conv_out(x, tiles.tile_pack(weight), bias, total=total, strip_sums=sums, **options)
    return total, sums


def parts(y: Tensor) -> list[Tensor]:
    """Returns the strips of a map as (N, C, pixels), by the rule that the header states."""
    width = y.shape[3]
    rows = max(1, 64 // width)
    return [strip.flatten(2) for strip in y.double().split(rows, dim=2)]


def check(sums: Tensor, y: Tensor) -> None:
    """Holds the sums of a map to float64, within what float32 sums of n terms may be off."""
    strips = parts(y)
    assert sums.shape == (len(y), len(strips), 3, y.shape[1])
    for i, strip in enumerate(strips):
        first, s, q = sums[:, i].double().unbind(1)
        n = strip.shape[2]
        assert torch.equal(first, strip[:, :, 0])
        d = strip - strip[:, :, :1]
        eps = n * torch.finfo(torch.float32).eps
        assert ((s - d.sum(2)).abs() <= eps * d.abs().sum(2)).all()
        assert ((q - (d**2).sum(2)).abs() <= eps * (d**2).sum(2)).all()
        exact = ((strip - strip.mean(2, keepdim=True)) ** 2).sum(2)
        assert ((d**2).sum(2) <= n * exact * (1 + 1e-9) + 1e-30).all()  # the header's bound
        assert ((q - s**2 / n - exact).abs() <= 3 * eps * n * exact + 1e-30).all()


@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_those_of_the_map_at_every_level(name):
    x, weight, bias, added, dilation = case(name)
    found = []
    for level in LEVELS:
        with ops.isa(level):
            found.append(convolve_with_sums(x, weight, bias, added=added, dilation=dilation))
    for (total, sums), level in zip(found, LEVELS, strict=True):
        assert torch.equal(total, found[0][0]), level
        assert torch.equal(sums, found[0][1]), level
    check(found[0][1], found[0][0])


def test_sums_do_not_change_what_is_written():
    x, weight, bias, added, _ = case("prime sizes")
    total, out = empty(x, len(weight)), empty(x, len(weight))
    options = {"added": added, "activation": "silu"}
    tiles.tile_conv_out(x, tiles.tile_pack(weight), bias, total=total, out=out, **options)
    other = empty(x, len(weight))
    again, sums = convolve_with_sums(x, weight, bias, out=other, **options)
    assert torch.equal(again, total)
    assert torch.equal(other, out)
    check(sums, total)


def test_sums_of_a_mean_far_from_zero():
    """Of E[x^2] - E[x]^2 in float32 few digits are left."""
    x = nhwc(noise_like(2, 32, 16, 16).bfloat16())
    weight = noise_like(32, 32, 3, 3, seed=1) * 3.0
    total, sums = convolve_with_sums(x, weight, torch.full((32,), 2.0e4))
    check(sums, total)
    (strip, *_) = parts(total)
    narrow, exact = strip.float(), strip.var(2, correction=0)
    assert ((narrow.square().mean(2) - narrow.mean(2) ** 2 - exact).abs() > 1e-4 * exact).any()


def test_sums_of_channels_that_are_constant_but_for_one_pixel():
    """The first of a strip, from which all others are subtracted; and none."""
    x = nhwc(torch.zeros(1, 32, 8, 16).bfloat16())
    x[0, 0, 4, 0] = 1.0
    weight = torch.zeros(32, 32, 1, 1)
    weight[0, 0] = 1e4
    total, sums = convolve_with_sums(x, weight, torch.linspace(-3, 3, 32))
    check(sums, total)
    assert (sums[:, :, 1:, 1:] == 0).all()
    assert (sums[0, :, 2, 0] > 0).tolist() == [False, True]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "dilation"), [(16, 1), (16, 4), (10, 1), (70, 2)])
def test_sums_are_independent_of_threads_and_batch(width, dilation, set_threads):
    x = nhwc(F.elu(noise_like(5, 40, 21, width)).bfloat16())
    weight, bias = noise_like(72, 40, 3, 3, seed=1), noise_like(72, seed=2)
    set_threads(1)
    _, whole = convolve_with_sums(x, weight, bias, dilation=dilation)
    for threads in (2, 3, 7):
        set_threads(threads)
        _, sums = convolve_with_sums(x, weight, bias, dilation=dilation)
        assert torch.equal(sums, whole)
        _, one = convolve_with_sums(x[3:4], weight, bias, dilation=dilation)
        assert torch.equal(one, whole[3:4])


def padded(x: Tensor, border: int) -> tiles.Padded:
    made = tiles.Padded.zeros(tuple(x.shape), border)
    made.pixels.copy_(x)
    return made


def check_zeros(y: tiles.Padded) -> None:
    y.pixels.zero_()
    assert (y.memory == 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_padded_maps_give_the_bits_of_dense_ones(name):
    """Borders of just what is read, and wider ones; of the input, the output and both."""
    x, weight, bias, added, dilation = case(name)
    packed, reach = tiles.tile_pack(weight), weight.shape[2] // 2 * min(dilation, max(x.shape[2:]))
    dense, out = empty(x, len(weight)), empty(x, len(weight))
    options = {"added": added, "dilation": dilation, "activation": "elu"}
    tiles.tile_conv_out(x, packed, bias, total=dense, out=out, **options)
    for border, y_border in ((reach, 0), (reach + 1, 1), (reach + 3, 2)):
        total, y = empty(x, len(weight)), tiles.Padded.zeros(tuple(out.shape), y_border)
        sums = empty_sums(x, len(weight))
        tiles.tile_conv_out(
            padded(x, border), packed, bias, total=total, out=y, strip_sums=sums, **options
        )
        assert torch.equal(total, dense)
        assert torch.equal(y.pixels, out)
        check_zeros(y)
        check(sums, total)


@pytest.mark.parametrize("name", SHAPES)
def test_all_that_is_read_around_a_map_is_zeroed(name, set_threads):
    """And no pixel. What is read only for pixels outside, whose sums are dropped, need not be."""
    x, weight, bias, _, dilation = case(name)
    packed, border = tiles.tile_pack(weight), weight.shape[2] // 2 * min(dilation, max(x.shape[2:]))
    dense, total = empty(x, len(weight)), empty(x, len(weight))
    tiles.tile_conv_out(x, packed, bias, total=dense, dilation=dilation)
    n, c, height, width = x.shape
    for threads in (1, 3):
        set_threads(threads)
        made = tiles.Padded.zeros(tuple(x.shape), border)
        made.memory.fill_(torch.nan)
        made.pixels.copy_(x)
        _C.zero_around(made.array("x"), (n, height, width, c), border, -1)
        assert torch.equal(made.pixels, x)
        tiles.tile_conv_out(made, packed, bias, total=total, dilation=dilation)
        assert torch.equal(total, dense)


def test_padded_maps_are_independent_of_threads_and_level(set_threads):
    x = nhwc(noise_like(3, 48, 13, 10).bfloat16())
    weight = noise_like(70, 48, 3, 3, seed=1)
    set_threads(1)
    total, sums = convolve_with_sums(padded(x, 1), weight, None)
    for threads in (2, 3, 7):
        set_threads(threads)
        for level in LEVELS:
            with ops.isa(level):
                again, other = convolve_with_sums(padded(x, 1), weight, None)
            assert torch.equal(again, total)
            assert torch.equal(other, sums)


def test_a_convolution_refuses_maps_that_are_padded_too_little_or_of_other_sizes():
    x, weight = nhwc(noise_like(1, 16, 6, 6).bfloat16()), noise_like(16, 16, 3, 3)
    packed, total = tiles.tile_pack(weight), empty(x, 16)
    with pytest.raises(ValueError, match="border of x must be at least 2, or -1; got 1"):
        tiles.tile_conv_out(padded(x, 1), packed, total=total, dilation=2)
    with pytest.raises(ValueError, match=r"out must have shape \(1, 16, 6, 6\); got \(1, 16, 6, 5"):
        tiles.tile_conv_out(x, packed, out=tiles.Padded.zeros((1, 16, 6, 5), 1))
    short = tiles.Padded(padded(x, 1).memory[:-1], (1, 16, 6, 6), 1)
    with pytest.raises(ValueError, match="x must have shape"):
        tiles.tile_conv_out(short, packed, total=total)
    with pytest.raises(ValueError, match=r"strip_sums must have shape \(1, 1, 3, 16\)"):
        tiles.tile_conv_out(x, packed, total=total, strip_sums=torch.zeros(1, 2, 3, 16))
    with pytest.raises(ValueError, match="sum with strip_sums"):
        tiles.tile_conv_out(x, packed, out=total, strip_sums=empty_sums(x, 16))


NORM_SIZES = {  # N, channels, height, width
    "whole strips": (2, 32, 8, 16),
    "the last strip is shorter": (3, 37, 13, 7),
    "one pixel": (2, 16, 1, 1),
    "a strip is a row": (1, 19, 5, 67),
}


def sums_of(y: Tensor) -> Tensor:
    """Returns the sums that a convolution would leave of a map."""
    unit = torch.eye(y.shape[1])[:, :, None, None]
    total, sums = convolve_with_sums(y, unit, None)
    assert torch.equal(total, y)
    return sums


def run_norm(
    kind: str, x: Tensor, out: Tensor | tiles.Padded, sums: Tensor | None, parameters: list[Tensor]
) -> None:
    """Runs a norm and an activation, with sums or without, into a dense map or a padded one."""
    n, c, height, width = x.shape
    border = addresses.DENSE
    if isinstance(out, tiles.Padded):
        y, border = out.array("out"), out.border
    else:
        y = addresses.array("out", out, x.shape, torch.bfloat16, layout=addresses.NHWC)
    rows = [addresses.array("parameters", p, tuple(p.shape), torch.float32) for p in parameters]
    given = addresses.NONE
    if sums is not None:
        given = addresses.array("sums", sums, tuple(sums.shape), torch.float32)
    maps = [addresses.array("x", x, x.shape, x.dtype, layout=addresses.NHWC), y]
    sizes, narrow = [n, c, height * width], x.dtype is torch.bfloat16
    end = [1e-5, given, width, border, extension.forced_isa.get()]
    if kind == "IN++":
        _C.instance_norm_plus(*maps, *rows, *sizes, True, False, narrow, True, True, *end)
    else:
        none, groups = [addresses.NONE] * 3, 1 if c % 8 else 8
        flags = [True, narrow, True, activation_code("elu")]
        _C.group_norm(*maps, *rows[:2], *none, *sizes, groups, *flags, *end)


def norm_case(kind: str, name: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns a map whose channels have uneven means, parameters, and what the norm is exactly."""
    n, c, height, width = NORM_SIZES[name]
    x = noise_like(n, c, height, width) * torch.linspace(0.2, 3, c)[:, None, None] - 2.3
    x = nhwc((x + noise_like(n, c, 1, 1, seed=1) * 5).bfloat16())
    parameters = [noise_like(c, seed=k) + 0.3 for k in range(2, 5)]
    exact = [p.double() for p in parameters]
    if kind == "IN++":
        return x, parameters, reference.instance_norm_plus(x.double(), *exact, elu=True)
    groups = 1 if c % 8 else 8
    return x, parameters, reference.group_norm(x.double(), groups, *exact[:2], activation="elu")


@pytest.mark.parametrize("kind", ["IN++", "group norm"])
@pytest.mark.parametrize("name", NORM_SIZES)
def test_norms_of_given_sums(kind, name):
    """As precise as those that read the map; the same bits at every level."""
    x, parameters, exact = norm_case(kind, name)
    sums, results = sums_of(x), []
    for level in LEVELS:
        with ops.isa(level):
            results.append(empty(x, x.shape[1]))
            run_norm(kind, x, results[-1], sums, parameters)
    assert all(torch.equal(result, results[0]) for result in results)
    own = empty(x, x.shape[1])
    run_norm(kind, x, own, None, parameters)
    assert relative(results[0], exact) <= 1.02 * relative(own, exact) + 1e-5


@pytest.mark.parametrize("kind", ["IN++", "group norm"])
def test_norms_read_no_statistics_of_their_own_where_sums_are_given(kind):
    """Those of a map that is twice as large, about another mean."""
    x, parameters, _ = norm_case(kind, "whole strips")
    other = nhwc((2 * x.float() + 1).bfloat16())
    expected, y = empty(x, x.shape[1]), empty(x, x.shape[1])
    run_norm(kind, other, expected, sums_of(other), parameters)
    run_norm(kind, x, y, sums_of(other), parameters)
    assert relative(y, expected.double()) > 0.3
    run_norm(kind, other, y, None, parameters)
    assert relative(y, expected.double()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["IN++", "group norm"])
@pytest.mark.parametrize("name", NORM_SIZES)
def test_norms_write_padded_maps(kind, name, dtype, set_threads):
    """Of maps in either type, which are converted on the way."""
    x, parameters, _ = norm_case(kind, name)
    x, dense = nhwc(x.to(dtype)), empty(x, x.shape[1])
    run_norm(kind, x, dense, None, parameters)
    for border, threads in ((0, 1), (1, 2), (3, 3)):
        set_threads(threads)
        y = tiles.Padded.zeros(tuple(x.shape), border)
        run_norm(kind, x, y, None, parameters)
        assert torch.equal(y.pixels, dense)
        check_zeros(y)


@pytest.mark.parametrize("name", NORM_SIZES)
def test_sums_of_maps_write_padded_maps(name):
    """a + b, weighted, with its activation; the sum stays dense."""
    n, c, height, width = NORM_SIZES[name]
    a, b = (nhwc(noise_like(n, c, height, width, seed=k).bfloat16()) for k in (0, 1))
    total, out, again = (empty(a, c) for _ in range(3))
    ops.cpu.add_activation_out(a, b, total=total, out=out, activation="silu", weights=(0.7, 1.5))
    for border in (0, 2):
        y = tiles.Padded.zeros((n, c, height, width), border)
        _C.add_activation(
            *(addresses.array("map", t, t.shape, t.dtype, layout=addresses.NHWC)
              for t in (a, b, again)),
            y.array("y"), n * height * width, c, True, activation_code("silu"), 0.7, 1.5,
            (n, height, width, c), border, -1,
        )  # fmt: skip
        assert torch.equal(again, total)
        assert torch.equal(y.pixels, out)
        check_zeros(y)
