"""The launchers of the extension: what they take, what they refuse, and float16's conversions."""

import re

import pytest
import torch
from paths import ROOT
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import addresses, backends, cuda, native, reference


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def parameters(*shape: int) -> list[Tensor]:
    return [noise_like(*shape, seed=k) * 0.5 + offset for k, offset in enumerate((1, 1, 0.1))]


def converted(x: Tensor) -> Tensor:
    """float16 from float32 or the other way, by the extension."""
    widen = x.dtype is torch.float16
    out = torch.empty_like(x, dtype=torch.float32 if widen else torch.float16)
    values, halves = (out, x) if widen else (x, out)
    _C.convert_float16(
        addresses.array("values", values, tuple(x.shape), torch.float32),
        addresses.array("halves", halves, tuple(x.shape), torch.float16), x.numel(), widen,
    )  # fmt: skip
    return out


def test_every_float16_to_float32():
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    ours, theirs = converted(halves), halves.float()
    numbers = ~theirs.isnan()
    assert torch.equal(ours.view(torch.int32)[numbers], theirs.view(torch.int32)[numbers])
    assert ours[~numbers].isnan().all()


def test_every_rounding_to_float16():
    """Every float16, the middle between two neighbours, and the floats next to both."""
    ends = torch.arange(0, 0x7C00).to(torch.int16).view(torch.float16).double()
    middles = (ends[1:] + ends[:-1]) / 2
    middles = torch.cat((ends, middles, torch.tensor([65520.0, 65536.0, 1e30, torch.inf]).double()))
    at = middles.float().view(torch.int32)
    near = torch.cat([(at + k).clamp(0, 0x7F800000) for k in (-2, -1, 0, 1, 2)]).view(torch.float32)
    x = torch.cat((near, -near))
    assert torch.equal(converted(x).view(torch.int16), x.half().view(torch.int16))
    assert converted(torch.tensor([torch.nan, -torch.nan])).isnan().all()


def test_rounding_of_random_bits_to_float16():
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    assert torch.equal(converted(x).view(torch.int16), x.half().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_op(dtype):
    x = nhwc((noise_like(3, 24, 9, 7) - 2.3).to(dtype))
    for affine in (parameters(24), parameters(3, 24)):
        expected = ops.instance_norm_plus(x, *affine, elu=True)
        for form in ("auto", "split", "single"):
            assert torch.equal(native.instance_norm_plus(x, *affine, elu=True, form=form), expected)


def test_norm_into_buffers_with_bias_and_rows_of_a_table():
    x, table = nhwc(noise_like(3, 24, 9, 7) - 2.3), noise_like(3, 80, seed=4)
    affine, bias = (table[:, :24], noise_like(24, seed=5), table[:, 40:64]), noise_like(24, seed=6)
    out, partials = torch.empty_like(x, dtype=torch.bfloat16), native.new_partials(x)
    result = native.instance_norm_plus(x, *affine, bias=bias, out=out, partials=partials)
    assert result is out
    moved = x.double() + bias[:, None, None]
    exact = reference.instance_norm_plus(moved, *affine)
    assert (out.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    mixed = [affine[0].half(), affine[1].double(), affine[2].expand(3, 24)]
    assert torch.equal(
        native.instance_norm_plus(x, *mixed),
        native.instance_norm_plus(x, affine[0].half().float(), *affine[1:]),
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    x = nhwc(torch.empty(shape))
    assert native.instance_norm_plus(x, *parameters(shape[1])).shape == shape


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4, 5, 5)}, ValueError, "channels-last"),
        ({"x": torch.zeros(4, 5, 5)}, ValueError, r"\(N, C, H, W\)"),
        ({"x": nhwc(torch.zeros(2, 4, 5, 5)).double()}, TypeError, "float16"),
        ({"x": nhwc(torch.zeros(2, 4, 5, 5)).half()}, TypeError, "on the CPU .* got float16"),
        ({"alpha": torch.zeros(3)}, ValueError, r"alpha must have shape \(4,\) or \(2, 4\)"),
        ({"gamma": torch.zeros(4, device="meta")}, ValueError, "gamma must be on cpu"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\)"),
        ({"form": "both"}, ValueError, '"single"'),
        ({"out": torch.zeros(2, 4, 5, 5)}, ValueError, "out must be channels-last"),
    ],
)
def test_refusals(change, error, text):
    affine = dict(zip(("alpha", "gamma", "beta"), parameters(4), strict=True))
    with pytest.raises(error, match=text):
        native.instance_norm_plus(**({"x": nhwc(torch.zeros(2, 4, 5, 5)), **affine} | change))


def test_one_launch_is_chosen_as_in_triton():
    text = (ROOT / "kernels" / "instance_norm_plus.py").read_text()
    size, channels = (
        re.search(rf"^{name} = ([\d* ]+)", text, re.MULTILINE)[1]
        for name in ("SINGLE_BYTES", "SINGLE_CHANNELS")
    )
    kib, one = (int(factor) for factor in size.split("*"))
    assert (kib * one, int(channels)) == (native.SINGLE_BYTES, native.SINGLE_CHANNELS)


def test_without_cuda_the_remedy_is_said(monkeypatch):
    class OnCuda:
        is_cpu, is_cuda = False, True

    for name in ("instance_norm_plus_cuda", "sampler_update_rows_cuda"):
        monkeypatch.delattr(_C, name, raising=False)
        with pytest.raises(RuntimeError, match="NCSN_FAST_CUDA=1 pip install"):
            native._kernel(OnCuda(), "instance_norm_plus_rows", name)


def test_what_the_extension_refuses():
    with pytest.raises(ValueError, match="dtype must be 0"):
        _C.norm_tiles(3, 4, 3)
    with pytest.raises(ValueError, match="sizes must not be negative"):
        _C.norm_tiles(-3, 4, 0)


@pytest.mark.parametrize(
    ("family", "module"), [("cuda", "ops.native"), ("triton", "kernels.instance_norm_plus")]
)
def test_the_family_that_is_asked_for_is_called(monkeypatch, family, module):
    if family == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(backends, "missing", lambda family: "")
    launched = []

    def launch(x, *parameters, elu, eps):
        launched.append((len(parameters), elu, eps))
        return x + 1

    monkeypatch.setattr(f"ncsn_fast.{module}.instance_norm_plus", launch)
    x, rows = torch.rand(2, 3, 4, 5), torch.ones(2, 3)
    with ops.backend(family):
        y = cuda.instance_norm_plus(x, rows, rows, rows, True, 1e-5)
    assert launched == [(3, True, 1e-5)]
    assert torch.equal(y, x + 1)
