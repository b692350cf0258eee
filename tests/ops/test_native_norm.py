"""The CUDA kernels of instance normalisation++, run phase by phase on the CPU."""

import norm_cases
import pytest
import torch
from norm_cases import noise_like, parameters, sensitivity, worst
from torch import Tensor

from ncsn_fast import _C
from ncsn_fast.ops import native, reference
from ncsn_fast.ops.addresses import array
from ncsn_fast.ops.native import DTYPES

FLOATS = tuple(DTYPES)
FORMS = ("split", "single")


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def bright_top(x: Tensor) -> Tensor:
    x[:, :, :3] += 300.0
    return x


# Those of all kernels, and vectors, blocks and tiles of these: "single" has at most 512 channels.
INPUTS = {name: make for name, make in norm_cases.INPUTS.items() if name != "many channels"} | {
    "whole vectors": lambda: noise_like(2, 16, 8, 8) - 2.3,
    "three vectors": lambda: noise_like(2, 24, 9, 9) * 1.7 - 2.3,
    "uneven blocks": lambda: noise_like(1, 200, 5, 13) - 2.3,
    "several tiles of vectors": lambda: noise_like(1, 8, 67, 71) - 2.3,
    "most tiles": lambda: noise_like(1, 3, 181, 191) - 2.3,
    "first tile an outlier": lambda: bright_top(noise_like(1, 8, 67, 71)),
    "large offset of many tiles": lambda: noise_like(1, 64, 96, 96) + 1e3,
    "512 channels": lambda: noise_like(1, 512, 3, 5) - 2.3,
}
MANY = {
    "2000 channels": lambda: noise_like(2, 2000, 3, 5) - 2.3,
    "2048 channels": lambda: noise_like(1, 2048, 4, 4) - 2.3,
    "2003 channels": lambda: noise_like(1, 2003, 2, 3) - 2.3,
}


def emulated(
    x, alpha, gamma, beta, *, elu=False, bias=None, out=None, form="split", backward=False
):
    """What the CUDA kernels give for a channels-last x."""
    n, c, height, width = x.shape
    out = torch.empty_like(x) if out is None else out
    partials = torch.full((*native.new_partials(x).shape,), float("nan"))
    _C.emulated_instance_norm_plus(
        native._map("x", x), native._map("out", out), (n, c, height * width),
        [native._row("parameter", p) for p in (alpha, gamma, beta)],
        array("bias", bias, (c,), torch.float32), elu, 1e-5,
        array("partials", partials, tuple(partials.shape), torch.float32), form == "single",
        backward,
    )  # fmt: skip
    return out


def check(x: Tensor, per_sample: bool, elu: bool, form: str) -> None:
    x, affine = nhwc(x), parameters(*x.shape[:2], per_sample)
    exact = reference.instance_norm_plus(x.double(), *affine, elu=elu)
    eager = reference.instance_norm_plus(x, *affine, elu=elu)
    ours = emulated(x, *affine, elu=elu, form=form)
    # Two roundings of the largest output.
    floor = 2 * torch.finfo(x.dtype).eps * exact.abs().max().item() + sensitivity(x, *affine[:2])
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", INPUTS)
def test_within_twice_eager(name, dtype, form):
    for per_sample, elu in ((form == "split", dtype != torch.float32), (form != "split", True)):
        check(INPUTS[name]().to(dtype), per_sample, elu, form)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MANY)
def test_more_channels_than_a_block_has_threads(name, dtype):
    check(MANY[name]().to(dtype), True, True, "split")


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_cpu_kernel(form):
    x, affine = nhwc(noise_like(3, 40, 11, 13) - 2.3), parameters(3, 40, True)
    ours = emulated(x, *affine, elu=True, form=form)
    # The CPU's means are float64; ours are off by 2^-23, and standardised by a spread of 1 / 12.
    cpu = native.instance_norm_plus(x, *affine, elu=True)
    torch.testing.assert_close(ours, cpu, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (2, 7, 9, 7), (1, 8, 67, 71)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_order_of_threads_does_not_matter(dtype, shape, form):
    x, affine = nhwc((noise_like(*shape) - 2.3).to(dtype)), parameters(*shape[:2])
    forward, backward = (emulated(x, *affine, form=form, backward=b) for b in (False, True))
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [16, 12, 13])
def test_independent_of_batch_and_place(channels, form):
    x, affine = nhwc(noise_like(4, channels, 9, 7) - 2.3), parameters(4, channels, True)
    y = emulated(x, *affine, elu=True, form=form)
    for i in (0, 3):
        alone = (t[i : i + 1] for t in (x, *affine))
        assert torch.equal(emulated(*alone, elu=True, form=form), y[i : i + 1])
    turned = emulated(nhwc(x.flip(0)), *(p.flip(0) for p in affine), elu=True, form=form)
    assert torch.equal(turned.flip(0), y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [8, 7])
def test_nan_stays_in_its_sample(channels, form):
    x, affine = nhwc(noise_like(3, channels, 5, 5)), parameters(3, channels)
    clean = emulated(x, *affine, elu=True, form=form)
    x[1, 2, 3, 4] = float("nan")
    y = emulated(x, *affine, elu=True, form=form)
    assert y[1].isnan().all()  # through the spread of the means
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.1, -2.3, 1e3, 1e-30])
@pytest.mark.parametrize("channels", [16, 5])
def test_constant_channels_give_the_shift_exactly(channels, value, form):
    x = (value * torch.arange(1, channels + 1)[None, :, None, None]).expand(2, channels, 33, 35)
    alpha, gamma, beta = parameters(2, channels)
    gamma = gamma * 2.0**40  # a variance that is not 0 would show
    y = emulated(nhwc(x), torch.zeros(channels), gamma, beta, form=form)
    assert torch.equal(y, beta[None, :, None, None].expand_as(y))
    y = emulated(nhwc(x), *parameters(2, channels), form=form)
    mean = x[0, :, 0, 0].double()
    mean_hat = (mean - mean.mean()) / (mean.var() + 1e-5).sqrt()
    expected = parameters(2, channels)[1] * alpha * mean_hat + beta
    torch.testing.assert_close(y[0, :, 0, 0].double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [24, 10])
def test_bias_is_as_if_it_had_been_added(channels, dtype, form):
    x = nhwc((noise_like(2, channels, 9, 7) - 2.3).to(dtype))
    affine, bias = parameters(2, channels, True), noise_like(channels, seed=9) * 3
    moved = x.double() + bias[:, None, None]
    exact = reference.instance_norm_plus(moved, *affine, elu=True)
    y = emulated(x, *affine, elu=True, bias=bias, form=form)
    bound = 2 * torch.finfo(dtype).eps * exact.abs().max().item() + sensitivity(moved, *affine[:2])
    assert worst(y, exact) <= 2 * bound


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_wider_table(form):
    """Parameters are slices of a table as a conditional network keeps it, each with its stride."""
    x, table = nhwc(noise_like(3, 16, 5, 5)), noise_like(3, 50, seed=4)
    affine = table[:, 2:18], noise_like(16, seed=5), table[:, 30:46]
    y = emulated(x, *affine, form=form)
    assert torch.equal(y, emulated(x, *(p.expand(3, -1).contiguous() for p in affine), form=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [8, 12, 7])
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_every_pair_of_types(of, to, channels, form):
    x, affine = nhwc((noise_like(2, channels, 5, 7) - 2.3).to(of)), parameters(2, channels)
    out = torch.full_like(x, float("nan"), dtype=to)
    emulated(x, *affine, elu=True, form=form, out=out)
    exact = reference.instance_norm_plus(x.double(), *affine, elu=True)
    assert worst(out, exact) <= torch.finfo(to).eps * exact.abs().max() + 4e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [8, 7])
def test_in_place(channels, form):
    x, affine = nhwc(noise_like(2, channels, 17, 9)), parameters(2, channels)
    expected = emulated(x, *affine, elu=True, form=form)
    emulated(x, *affine, elu=True, form=form, out=x)
    assert torch.equal(x, expected)


def test_elu_over_its_whole_range():
    z = torch.cat((-torch.logspace(-8, 2, 511), torch.tensor([0.0])))
    x = torch.stack((z, -z)).reshape(1, 1, 2, 512).expand(1, 8, 2, 512)
    zero = torch.zeros(8)
    gamma = (x.double().var(dim=(0, 2, 3), correction=0) + 1e-5).sqrt().float()
    linear = emulated(nhwc(x), zero, gamma, zero)
    exact = torch.nn.functional.elu(linear.double())
    for dtype, bound in ((torch.float32, 2.0), (torch.float16, 1.0), (torch.bfloat16, 1.0)):
        curved = emulated(
            nhwc(x), zero, gamma, zero, elu=True, out=torch.empty_like(linear, dtype=dtype)
        )
        error = (curved.double() - exact).abs()
        # the smallest normal number is where the spacing of float16 stops to shrink
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert (error <= bound * spacing).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_beyond_the_map(form, dtype):
    for channels in (8, 13):
        x, affine = nhwc(noise_like(3, channels, 5, 7).to(dtype)), parameters(3, channels)
        buffer = torch.full((x.numel() + 128,), 7.0, dtype=dtype)
        out = buffer[64:-64].view(3, 5, 7, channels).permute(0, 3, 1, 2)
        emulated(x, *affine, form=form, out=out)
        assert torch.equal(out, emulated(x, *affine, form=form))
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


@pytest.mark.parametrize("channels", [1, 3, 8, 24, 128, 200, 256, 512, 2000])
@pytest.mark.parametrize("side", [1, 4, 7, 16, 32, 64, 256])
def test_tiles_are_few_and_do_not_depend_on_the_batch(side, channels):
    for dtype in FLOATS:
        maps = (torch.empty(n, channels, side, side, dtype=dtype, device="meta") for n in (1, 5))
        shapes = [native.new_partials(nhwc(x)).shape for x in maps]
        assert shapes[0][1:] == shapes[1][1:]
        assert 1 <= shapes[0][1] <= 32


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    x = nhwc(torch.empty(shape))
    for form in FORMS:
        assert emulated(x, *parameters(*shape[:2]), form=form).shape == shape


def test_what_the_kernels_refuse():
    x = nhwc(torch.zeros(1, 513, 2, 2))
    with pytest.raises(ValueError, match="at most 512 channels; got 513"):
        emulated(x, *parameters(1, 513), form="single")
    shifted = torch.zeros(8 * 4 + 1)[1:].view(1, 2, 2, 8).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        emulated(shifted, *parameters(1, 8))
    # Pixels of 16 bytes in x, which the statistics read whole, and of 8 in out.
    shifted = torch.zeros(4 * 4 + 1)[1:].view(1, 2, 2, 4).permute(0, 3, 1, 2)
    out = torch.empty_like(shifted, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        emulated(shifted, *parameters(1, 4), out=out)
