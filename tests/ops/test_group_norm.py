"""The fused group normalisation against its float64 specification, on adversarial inputs."""

import pytest
import torch
import torch.nn.functional as F
from cross_section import cross_section
from group_norm_cases import GROUPS, VARIANTS, options
from norm_cases import INPUTS, noise_like, worst

from ncsn_fast import _C, ops
from ncsn_fast.ops import cpu, reference
from ncsn_fast.ops.activations import ACTIVATIONS

LEVELS = _C.isa_levels()
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


def maps(*shape: int, layout: str = "nhwc", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = (noise_like(*shape) - 2.3).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "variant", "activation"),
    cross_section(list(INPUTS), list(LAYOUTS), list(EPSILON), VARIANTS, ("none", "silu")),
)
def test_within_twice_eager(name, layout, dtype, variant, activation):
    x, groups = INPUTS[name]().to(dtype).contiguous(memory_format=LAYOUTS[layout]), GROUPS[name]
    named = options(*x.shape[:2], variant) | {"activation": activation}
    exact = reference.group_norm(x.double(), groups, **named)
    eager = reference.group_norm(x, groups, **named)
    ours = ops.group_norm(x, groups, **named)
    # Floor: two roundings of the largest output.
    floor = 2 * EPSILON[dtype] * exact.abs().max().item()
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])
    for level in LEVELS:
        with ops.isa(level):
            assert torch.equal(ops.group_norm(x, groups, **named), ours), level


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_specification_is_pytorchs(activation):
    x = maps(2, 12, 5, 3).double()
    named = {name: p.double() for name, p in options(2, 12, "all").items()}
    add, scale, shift = (named[k][:, :, None, None] for k in ("add", "scale", "shift"))
    u = F.group_norm(x + add, 4, named["gamma"], named["beta"], eps=1e-3)
    expected = ACTIVATIONS[activation].function(u * (1 + scale) + shift)
    ours = reference.group_norm(x, 4, **named, activation=activation, eps=1e-3)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, layout):
    x, named = maps(2, 24, 7, 5, layout=layout), options(2, 24, "all") | {"activation": activation}
    exact = reference.group_norm(x.double(), 6, **named)
    ours = ops.group_norm(x, 6, **named)
    assert worst(ours, exact) <= 8 * EPSILON[torch.float32] * max(exact.abs().max().item(), 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_group_is_layer_norm_and_as_many_as_channels_instance_norm(layout):
    x, named = maps(2, 12, 6, 5, layout=layout), options(2, 12, "affine")
    flat = F.layer_norm(x.double().flatten(1), (12 * 30,)).reshape(x.shape)
    torch.testing.assert_close(ops.group_norm(x, 1).double(), flat, atol=2e-6, rtol=0)
    each = F.instance_norm(x.double(), weight=named["gamma"].double(), bias=named["beta"].double())
    torch.testing.assert_close(ops.group_norm(x, 12, **named).double(), each, atol=2e-6, rtol=0)


def test_mixed_dtypes_into_a_buffer():
    x, named = maps(2, 24, 6, 6), options(2, 24, "all") | {"activation": "silu"}
    full = ops.group_norm(x, 8, **named)
    positional = {"gamma": named.pop("gamma"), "beta": named.pop("beta")}
    half = torch.empty_like(x, dtype=torch.bfloat16)
    assert cpu.group_norm_out(x, 8, *positional.values(), half, **named) is half
    assert torch.equal(half, full.bfloat16())
    wide = torch.empty_like(x)
    cpu.group_norm_out(x.bfloat16(), 8, None, None, wide)
    assert torch.equal(wide, ops.group_norm(x.bfloat16().float(), 8))
    cpu.group_norm_out(x, 8, *positional.values(), x, **named)
    assert torch.equal(x, full)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.1, -2.3, 1e3])
def test_constant_groups_give_beta_exactly(layout, value):
    x = torch.full((2, 6, 33, 35), value)
    named = options(2, 6, "affine")
    y = ops.group_norm(x.contiguous(memory_format=LAYOUTS[layout]), 3, **named)
    assert torch.equal(y, named["beta"][:, None, None].expand_as(y))


def test_what_is_added_counts_as_if_it_had_been_added():
    """An offset of more than the spread of x, which sets the groups' variance."""
    x, add = maps(2, 12, 9, 7), noise_like(2, 12, seed=3) * 100
    exact = reference.group_norm(x.double() + add.double()[:, :, None, None], 3)
    assert worst(ops.group_norm(x, 3, add=add), exact) <= 2e-6
    for level in LEVELS:
        with ops.isa(level):
            assert worst(ops.group_norm(x, 3, add=add), exact) <= 2e-6


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4)])
def test_empty(shape):
    assert ops.group_norm(torch.empty(shape), 2).shape == shape


def test_nan_stays_in_its_group():
    x = noise_like(3, 8, 6, 6)
    clean = ops.group_norm(x, 2, activation="silu")
    x[1, 2, 3, 4] = float("nan")
    y = ops.group_norm(x, 2, activation="silu")
    assert y[1, :4].isnan().all()
    assert torch.equal(y[1, 4:], clean[1, 4:])
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 64, 24, 24), (1, 128, 32, 32)])
def test_independent_of_threads_and_batch(layout, shape, set_threads):
    x, named = maps(*shape, layout=layout), options(*shape[:2], "all") | {"activation": "silu"}
    set_threads(1)
    y = ops.group_norm(x, 8, **named)
    for threads in (2, 3, 4):
        set_threads(threads)
        assert torch.equal(ops.group_norm(x, 8, **named), y)
        for i in range(len(x)):
            rows = {
                k: p[i : i + 1] if k in ("add", "scale", "shift") else p for k, p in named.items()
            }
            assert torch.equal(ops.group_norm(x[i : i + 1], 8, **rows), y[i : i + 1])


def test_parameters_may_be_strided_and_low_precision():
    x, named = maps(2, 6, 5, 5), options(2, 6, "all")
    wide = torch.cat((named["scale"], named["shift"]), dim=1)
    halves = dict(zip(("scale", "shift"), wide.chunk(2, dim=1), strict=True))
    assert torch.equal(ops.group_norm(x, 3, **named | halves), ops.group_norm(x, 3, **named))
    low = named | {"gamma": named["gamma"].bfloat16()}
    rounded = named | {"gamma": named["gamma"].bfloat16().float()}
    assert torch.equal(ops.group_norm(x, 3, **low), ops.group_norm(x, 3, **rounded))


# Derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_float64_rule(activation):
    x = (noise_like(2, 4, 3, 2) - 0.3).double().requires_grad_()
    named = {k: p.double().requires_grad_() for k, p in options(2, 4, "all").items()}

    def op(x, gamma, beta, add, scale, shift):
        rows = {"add": add, "scale": scale, "shift": shift}
        return ops.group_norm(x, 2, gamma, beta, **rows, activation=activation)

    assert torch.autograd.gradcheck(op, (x, *named.values()))
    assert torch.autograd.gradgradcheck(op, (x, *named.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_gradients_against_float64(variant, layout):
    x, named = maps(3, 8, 6, 6, layout=layout), options(3, 8, variant)
    weights = noise_like(*x.shape, seed=9).contiguous(memory_format=LAYOUTS[layout])

    def gradients(call, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *named.values())]
        y = call(leaves[0], 4, **dict(zip(named, leaves[1:], strict=True)), activation="silu")
        return torch.autograd.grad((y * weights.to(dtype)).sum(), leaves)

    exact = gradients(reference.group_norm, torch.float64)
    eager = gradients(reference.group_norm, torch.float32)
    ours = gradients(ops.group_norm, torch.float32)
    for mine, other, truth in zip(ours, eager, exact, strict=True):
        floor = 8 * EPSILON[torch.float32] * truth.abs().max().item()
        assert worst(mine, truth) <= 2 * worst(other, truth) + floor
    assert ours[0].is_contiguous(memory_format=LAYOUTS[layout])


# PyTorch's own machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, variant):
    x, named = maps(2, 4, 5, 3, layout=layout), options(2, 4, variant)
    rows = [named.get(k) for k in ("gamma", "beta", "add", "scale", "shift")]
    for leaf in (x, *named.values()):
        leaf.requires_grad_()
    torch.library.opcheck(torch.ops.ncsn_fast.group_norm.default, (x, 2, *rows, "silu", 1e-5))


def test_compiles_and_exports():
    class Model(torch.nn.Module):
        def forward(self, x, scale, shift):
            return ops.group_norm(x * 2, 2, scale=scale, shift=shift, activation="silu") + 1

    inputs = (maps(2, 4, 5, 3), noise_like(2, 4), noise_like(2, 4, seed=1))
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), Model()(*inputs))
    program = torch.export.export(Model(), inputs)
    assert "ncsn_fast.group_norm" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


def test_float64_transforms_and_the_reference_backend_are_the_reference():
    x, named = maps(3, 4, 5, 3), options(3, 4, "affine") | {"activation": "gelu"}
    exact = ops.group_norm(x.double(), 2, **named)
    assert torch.equal(exact, reference.group_norm(x.double(), 2, **named))
    with ops.backend("reference"):
        y = ops.group_norm(x, 2, **named)
    assert torch.equal(y, reference.group_norm(x, 2, **named))
    each = torch.func.vmap(lambda image: ops.group_norm(image[None], 2, **named)[0])(x)
    torch.testing.assert_close(each, y)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(4, 5, 5)}, ValueError, r"\(N, C, H, W\); got \(4, 5, 5\)"),
        ({"x": torch.zeros(2, 4, 5, 5).half()}, TypeError, "float32, bfloat16 or float64; got"),
        ({"groups": 3}, ValueError, "divide the 4 channels of x; got 3"),
        ({"groups": 0}, ValueError, "got 0"),
        ({"gamma": torch.zeros(3)}, ValueError, r"gamma must have shape \(4,\).*got \(3,\)"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must have shape \(2, 4\).*got \(4,\)"),
        ({"add": torch.zeros(2, 4, device="meta")}, ValueError, "add must be on cpu"),
        ({"activation": "swish"}, ValueError, "one of none, elu, .*got 'swish'"),
    ],
)
def test_refusals(change, error, text):
    with pytest.raises(error, match=text):
        ops.group_norm(**({"x": torch.zeros(2, 4, 5, 5), "groups": 2} | change))


def test_refuses_a_buffer_of_another_layout():
    x = noise_like(2, 4, 5, 5)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="both contiguous or both channels-last"):
        cpu.group_norm_out(x, 2, None, None, out)
