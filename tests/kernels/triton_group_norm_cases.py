"""Group normalisation in Triton against its float64 specification, on adversarial inputs."""

import itertools

import pytest
import torch
from group_norm_cases import GROUPS, VARIANTS, options, slack
from ncsn_fast.kernels import group_norm as kernels
from ncsn_fast.kernels import launch, norm_statistics
from ncsn_fast.kernels.group_norm import group_norm, new_workspace, scale_shift
from norm_cases import INPUTS, noise_like
from torch import Tensor
from triton_common import DEVICE, FLOATS, assert_close, nhwc

from ncsn_fast.ops import reference
from ncsn_fast.ops.activations import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy: masked lanes overflow

FORMS = ("split", "single")


def on_device(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in named.items()}


def check(x: Tensor, groups: int, variant: str, activation: str = "silu", form: str = "auto"):
    named = options(*x.shape[:2], variant)
    exact = reference.group_norm(x.double(), groups, **named, activation=activation)
    inputs = nhwc(x), groups
    eager = reference.group_norm(*inputs, **on_device(named), activation=activation)
    ours = group_norm(*inputs, **on_device(named), activation=activation, form=form)
    assert_close(ours, eager, exact, slack(x, groups, named))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, dtype in itertools.product(INPUTS, FLOATS[:2])
        if name != "many channels" or dtype is FLOATS[0]
    ],
)
def test_within_twice_eager(name, dtype):
    x, groups = INPUTS[name]().to(dtype), GROUPS[name]
    check(x, groups, "all", "silu" if dtype is torch.float16 else "none", "split")
    if kernels.fits_single(x.shape[1], groups):
        check(x, groups, "affine", "none" if dtype is torch.float16 else "silu", "single")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_set_of_parameters_in_bfloat16(variant, form):
    check((noise_like(2, 24, 7, 5) - 2.3).bfloat16(), 6, variant, "silu", form)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    check((noise_like(2, 8, 5, 3) * 3).to(dtype), 2, "modulated", activation)


def test_the_names_are_those_of_the_ops():
    assert tuple(ACTIVATIONS) == launch.ACTIVATIONS


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a small map has several of everything there can be several of."""
    monkeypatch.setattr(norm_statistics, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(norm_statistics, "MOST_TILES", 3)


@pytest.mark.parametrize("groups", [1, 3, 7, 21])
def test_blocks_of_tiles_groups_and_members(groups, small_blocks):
    split = norm_statistics.tiling(5 * 7, 21, 4)
    assert split.tiles > 1
    check(noise_like(2, 21, 5, 7) - 2.3, groups, "all", "silu", "split")
    check(noise_like(1, 21, 5, 7) + 1e3, groups, "plain", "none", "split")
    check(noise_like(1, 48, 5, 7) - 2.3, 1, "add", "none", "split")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.1, -2.3, 1e3])
def test_constant_groups_give_beta_exactly(value, form):
    x, named = torch.full((2, 6, 9, 7), value), options(2, 6, "affine")
    y = group_norm(nhwc(x), 3, **on_device(named), form=form).cpu()
    assert torch.equal(y, named["beta"][:, None, None].expand_as(y))


@pytest.mark.parametrize("form", FORMS)
def test_independent_of_batch_and_place(form):
    x, named = noise_like(4, 12, 9, 7) - 2.3, options(4, 12, "all")

    def run(part):
        rows = {k: p[part] if p.ndim == 2 else p for k, p in named.items()}
        return group_norm(nhwc(x[part]), 3, **on_device(rows), activation="silu", form=form)

    y = run(slice(None))
    for i in (0, 3):
        assert torch.equal(run(slice(i, i + 1)), y[i : i + 1])
    assert torch.equal(run([3, 2, 1, 0]).flip(0), y)


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_group(form):
    x = noise_like(3, 8, 5, 5)
    clean = group_norm(nhwc(x), 2, activation="silu", form=form)
    x[1, 2, 3, 4] = float("nan")
    y = group_norm(nhwc(x), 2, activation="silu", form=form)
    assert y[1, :4].isnan().all()
    assert torch.equal(y[1, 4:], clean[1, 4:])
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_buffers_and_mixed_types():
    x, named = nhwc(noise_like(2, 24, 5, 5) - 2.3), on_device(options(2, 24, "all"))
    full = group_norm(x, 6, **named, activation="silu", form="split")
    out, workspace = torch.empty_like(x), new_workspace(x)
    given = {"out": out, "workspace": workspace, "form": "split"}
    assert group_norm(x, 6, **named, activation="silu", **given) is out
    assert torch.equal(out, full)
    half = torch.empty_like(x, dtype=torch.float16)
    group_norm(x, 6, **named, activation="silu", form="split", out=half)
    torch.testing.assert_close(half.float(), full, rtol=2.0**-10, atol=1e-6)
    low = {**named, "gamma": named["gamma"].half()}
    rounded = {**named, "gamma": named["gamma"].half().float()}
    assert torch.equal(group_norm(x, 6, **low), group_norm(x, 6, **rounded))
    group_norm(x, 6, **named, activation="silu", form="split", out=x)
    assert torch.equal(x, full)


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4)])
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert group_norm(x, 2).shape == shape


X = nhwc(torch.zeros(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4, 5, 5)}, ValueError, "channels-last"),
        ({"x": X.double()}, TypeError, "float16"),
        ({"groups": 3}, ValueError, "divide the 4 channels of x; got 3"),
        ({"gamma": torch.zeros(3)}, ValueError, r"gamma must have shape \(4,\)"),
        ({"shift": torch.zeros(4)}, ValueError, r"shift must have shape \(2, 4\)"),
        ({"activation": "mish"}, ValueError, "one of none, elu"),
        ({"form": "both"}, ValueError, '"single"'),
        (
            {"x": nhwc(torch.zeros(1, 6, 5, 5)), "form": "single"},
            ValueError,
            "power of two; got 6 in 2 groups",
        ),
        ({"workspace": (torch.zeros(1), torch.zeros(1)), "form": "split"}, ValueError, "workspace"),
    ],
)
def test_refusals(change, error, text):
    change = {
        k: v.to(DEVICE) if isinstance(v, Tensor) and k != "x" else v for k, v in change.items()
    }
    with pytest.raises(error, match=text):
        group_norm(**({"x": X, "groups": 2} | change))


@pytest.mark.parametrize(
    ("dtype", "activation"), [*zip(FLOATS, ("silu", "none", "gelu"), strict=True)]
)
def test_scale_and_shift(dtype, activation):
    """A pass of its own, in place too; the mean is a bias with the other sign."""
    x = nhwc((noise_like(2, 21, 5, 7) - 2.3).to(dtype))
    rows = (noise_like(2, 3, 21, seed=3) + 0.5).to(DEVICE)
    mean, scale, shift = rows.unbind(1)

    def specified(x: Tensor, *rows: Tensor) -> Tensor:
        bias, scale, shift = rows
        moved = reference.scale_shift(x, None, bias)
        return reference.scale_shift(moved, scale, shift, activation)

    exact = specified(x.cpu().double(), -mean.cpu(), scale.cpu(), shift.cpu())
    eager = specified(x.float(), -mean, scale, shift).to(dtype)
    assert_close(scale_shift(x, rows, activation), eager, exact)
    expected = scale_shift(x, rows, activation)
    assert torch.equal(scale_shift(x, rows, activation, out=x), expected)
    with pytest.raises(ValueError, match=r"float32 of shape \(2, 3, 21\)"):
        scale_shift(x, rows[:1], activation)
