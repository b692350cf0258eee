"""Instance normalisation++ in Triton against its float64 specification, on adversarial inputs."""

import itertools

import pytest
import torch
from ncsn_fast.kernels import norm_statistics
from ncsn_fast.kernels.instance_norm_plus import instance_norm_plus
from ncsn_fast.kernels.instance_norm_plus_backward import instance_norm_plus_backward
from ncsn_fast.kernels.norm_statistics import new_partials
from norm_cases import INPUTS, noise_like, parameters, sensitivity, worst
from torch import Tensor
from triton_common import DEVICE, FLOATS, assert_close, nhwc

from ncsn_fast.ops import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy: masked lanes overflow


CASES = list(itertools.product(INPUTS, ("split", "single"), (torch.float32, torch.float16)))
# More channels than one launch takes, and so slow to interpret that one type must do.
CASES = [case for case in CASES if case[0] != "many channels" or case[1:] == ("split", FLOATS[0])]


def on_device(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def check(
    x: Tensor, per_sample: bool, elu: bool, form: str = "auto", bias: Tensor | None = None
) -> None:
    """The norm of x, or of x + bias, which the kernel adds before anything is rounded."""
    affine = parameters(*x.shape[:2], per_sample)
    total = x.double() if bias is None else x.double() + bias[:, None, None]
    exact = reference.instance_norm_plus(total, *affine, elu=elu)
    inputs = (nhwc(x), *on_device(affine))
    eager = reference.instance_norm_plus(nhwc(total.to(x.dtype)), *inputs[1:], elu=elu)
    moved = None if bias is None else bias.to(DEVICE)
    ours = instance_norm_plus(*inputs, elu=elu, form=form, bias=moved)
    x = total
    assert_close(ours, eager, exact, sensitivity(x, *affine[:2]))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "form", "dtype"), CASES)
def test_within_twice_eager(name, dtype, form):
    x = INPUTS[name]().to(dtype)
    check(x, per_sample=form == "split", elu=dtype == torch.float16, form=form)


@pytest.mark.parametrize("name", ["offset", "prime sizes", "one channel"])
def test_bfloat16(name):
    check(INPUTS[name]().bfloat16(), per_sample=False, elu=False)


def test_the_other_pairs_of_options():
    x = noise_like(2, 9, 5, 3) - 2.3
    check(x, per_sample=True, elu=True, form="single")
    check(x, per_sample=False, elu=True, form="split")


@pytest.mark.parametrize("form", ["split", "single"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bias(dtype, form):
    """Of more than the spread of x, so that it sets the channels' means and their spread."""
    x, bias = noise_like(2, 37, 7, 11).sub(2.3).to(dtype), noise_like(37, seed=4) * 5 + 1
    check(x, per_sample=True, elu=True, form=form, bias=bias)
    affine = on_device(parameters(2, 37))
    plain = instance_norm_plus(nhwc(x), *affine, form=form)
    zero = torch.zeros(37, device=DEVICE)
    assert torch.equal(instance_norm_plus(nhwc(x), *affine, form=form, bias=zero), plain)


@pytest.mark.parametrize("form", ["split", "single"])
@pytest.mark.parametrize("shape", [(3, 1, 9, 9), (2, 19, 1, 1)], ids=["one channel", "one pixel"])
def test_bias_of_degenerate_shapes(shape, form):
    bias = noise_like(shape[1], seed=4) + 1
    check(noise_like(*shape) - 2.3, per_sample=False, elu=False, form=form, bias=bias)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a small map has several of everything there can be several of."""
    monkeypatch.setattr(norm_statistics, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(norm_statistics, "MOST_TILES", 3)


def test_blocks_of_tiles_and_chunks_of_channels(small_blocks):
    split = norm_statistics.tiling(5 * 7, 21, 4)
    assert split.tiles > 1
    assert split.rows > split.block_p
    check(noise_like(2, 21, 5, 7) - 2.3, per_sample=False, elu=True, form="split")
    check(noise_like(1, 21, 5, 7) + 1e3, per_sample=False, elu=False, form="split")
    bias = noise_like(21, seed=4) * 3
    check(noise_like(1, 21, 5, 7) - 2.3, per_sample=False, elu=False, form="split", bias=bias)


@pytest.mark.parametrize("form", ["split", "single"])
@pytest.mark.parametrize("value", [0.1, -2.3, 1e3])
def test_constant_channels_give_the_shift_exactly(value, form):
    x = (value * torch.arange(1, 6)[None, :, None, None]).expand(2, 5, 9, 7)
    affine = alpha, gamma, beta = parameters(2, 5)
    y = instance_norm_plus(nhwc(x), *on_device(affine), form=form).cpu()
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
    mean = x[0, :, 0, 0].double()
    mean_hat = (mean - mean.mean()) / (mean.var() + 1e-5).sqrt()
    torch.testing.assert_close(
        y[0, :, 0, 0].double(), gamma * alpha * mean_hat + beta, rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("form", ["split", "single"])
def test_independent_of_batch_and_place(form):
    x, affine = nhwc(noise_like(4, 12, 9, 7) - 2.3), on_device(parameters(4, 12, per_sample=True))
    y = instance_norm_plus(x, *affine, elu=True, form=form)
    for i in (0, 3):
        alone = [t[i : i + 1] for t in (x, *affine)]
        assert torch.equal(instance_norm_plus(*alone, elu=True, form=form), y[i : i + 1])
    turned = [t.flip(0) for t in (x, *affine)]
    turned[0] = nhwc(turned[0])
    assert torch.equal(instance_norm_plus(*turned, elu=True, form=form).flip(0), y)


@pytest.mark.parametrize("form", ["split", "single"])
def test_nan_stays_in_its_sample(form):
    x, affine = noise_like(3, 8, 5, 5), on_device(parameters(3, 8))
    clean = instance_norm_plus(nhwc(x), *affine, elu=True, form=form)
    x[1, 2, 3, 4] = float("nan")
    y = instance_norm_plus(nhwc(x), *affine, elu=True, form=form)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_buffers_and_mixed_types():
    x, affine = nhwc(noise_like(2, 24, 5, 5) - 2.3), on_device(parameters(2, 24))
    full = instance_norm_plus(x, *affine, elu=True, form="split")
    out, partials = torch.empty_like(x), new_partials(x)
    result = instance_norm_plus(x, *affine, elu=True, form="split", out=out, partials=partials)
    assert result is out
    assert torch.equal(out, full)
    half = torch.empty_like(x, dtype=torch.float16)
    instance_norm_plus(x, *affine, elu=True, form="split", out=half)
    torch.testing.assert_close(half.float(), full, rtol=2.0**-10, atol=1e-6)
    mixed = [affine[0].half(), affine[1].expand(2, 24), affine[2]]
    expected = instance_norm_plus(x, affine[0].half().float(), *affine[1:])
    assert torch.equal(instance_norm_plus(x, *mixed), expected)
    instance_norm_plus(x, *affine, elu=True, form="split", out=x)
    assert torch.equal(x, full)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert instance_norm_plus(x, *on_device(parameters(*shape[:2]))).shape == shape


def test_elu_is_accurate_over_its_whole_range():
    z = torch.cat((-torch.logspace(-8, 2, 511), torch.tensor([0.0])))
    x = nhwc(torch.stack((z, -z)).reshape(1, 1, 2, 512))
    zero = torch.zeros(1, device=DEVICE)
    gamma = (x.double().var(correction=0) + 1e-5).sqrt().float().reshape(1)
    linear = instance_norm_plus(x, zero, gamma, zero)
    exact = torch.nn.functional.elu(linear.double())
    for dtype, bound in ((torch.float32, 2.0), (torch.float16, 1.0)):
        curved = torch.empty_like(x, dtype=dtype)
        instance_norm_plus(x, zero, gamma, zero, elu=True, out=curved)
        error = (curved.double() - exact).abs()
        # the smallest normal number is where the spacing of float16 stops to shrink
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert (error <= bound * spacing).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4, 5, 5)}, ValueError, "channels-last"),
        ({"x": torch.zeros(4, 5, 5)}, ValueError, r"\(N, C, H, W\)"),
        ({"x": nhwc(torch.zeros(2, 4, 5, 5)).double()}, TypeError, "float16"),
        ({"alpha": torch.zeros(3)}, ValueError, r"alpha must have shape \(4,\) or \(2, 4\)"),
        ({"form": "both"}, ValueError, '"single"'),
        ({"bias": torch.zeros(2, 4)}, ValueError, r"bias must be float32.*shape \(4,\)"),
        ({"bias": torch.zeros(4).half()}, ValueError, "float16"),
        ({"partials": torch.zeros(1), "form": "split"}, ValueError, "new_partials"),
    ],
)
def test_refusals(change, error, text):
    affine = zip(("alpha", "gamma", "beta"), on_device(parameters(2, 4)), strict=True)
    arguments = {"x": nhwc(torch.zeros(2, 4, 5, 5)), **dict(affine)}
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=text):
        instance_norm_plus(**(arguments | change))


# Gradients ---------------------------------------------------------------------------------------


def check_gradients(x: Tensor, elu: bool, per_sample: bool) -> None:
    affine = parameters(*x.shape[:2], per_sample)
    grad = noise_like(*x.shape, seed=9).to(x.dtype)
    leaves = [t.double().requires_grad_() for t in (x, *affine)]
    y = reference.instance_norm_plus(*leaves, elu=elu)
    exact = torch.autograd.grad(y, leaves, grad.double())
    inputs = (nhwc(grad), nhwc(x), *on_device(affine))
    eager = reference.instance_norm_plus_backward(*inputs, elu=elu)
    ours = instance_norm_plus_backward(*inputs, elu=elu)
    for mine, other, truth in zip(ours, eager, exact, strict=True):
        floor = 6 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        assert_close(mine, other, truth, floor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("elu", [False, True], ids=["linear", "elu"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "conditional"])
def test_gradients(per_sample, elu, dtype):
    check_gradients((noise_like(3, 10, 6, 5) - 2.3).to(dtype), elu, per_sample)


@pytest.mark.parametrize("name", ["prime sizes", "one channel", "one pixel", "one element"])
def test_gradients_of_other_shapes(name):
    check_gradients(INPUTS[name](), elu=True, per_sample=False)


def test_gradients_in_blocks_and_chunks(small_blocks):
    check_gradients(noise_like(2, 21, 5, 7) - 2.3, elu=True, per_sample=False)


def test_shared_gradients_of_many_samples():
    check_gradients(noise_like(37, 3, 2, 2) - 2.3, elu=False, per_sample=False)


def test_gradients_do_not_depend_on_the_batch():
    x, affine = noise_like(3, 8, 5, 4) - 2.3, on_device(parameters(3, 8, per_sample=True))
    grad = noise_like(3, 8, 5, 4, seed=9)
    whole = instance_norm_plus_backward(nhwc(grad), nhwc(x), *affine, elu=True)
    rest = [p[1:] for p in affine]
    part = instance_norm_plus_backward(nhwc(grad[1:]), nhwc(x[1:]), *rest, elu=True)
    assert all(torch.equal(a[1:], b) for a, b in zip(whole, part, strict=True))


def test_empty_batches_have_no_gradient():
    x, affine = nhwc(torch.empty(0, 3, 4, 4)), on_device(parameters(0, 3))
    grad_x, *rest = instance_norm_plus_backward(x, x, *affine)
    assert grad_x.shape == x.shape
    assert all(torch.equal(g.cpu(), torch.zeros(3)) for g in rest)
    assert worst(grad_x, grad_x.double()) == 0
