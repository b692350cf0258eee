"""The CPU's gradients of norms and activations against float64, on adversarial inputs."""

from collections.abc import Callable

import pytest
import torch
from cross_section import cross_section
from group_norm_cases import GROUPS, VARIANTS, options
from norm_cases import INPUTS, noise_like, parameters, worst
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import extension, gradients, reference
from ncsn_fast.ops.activations import ACTIVATIONS

LEVELS = _C.isa_levels()
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
ROWS = ("gamma", "beta", "add", "scale", "shift")
Gradients = Callable[[Tensor, Tensor], list[Tensor]]


def pair(name: str, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """An input of norm_cases, and a gradient of its output."""
    x = INPUTS[name]().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    grad = (noise_like(*x.shape, seed=9) + 0.1).to(dtype)
    return x, grad.contiguous(memory_format=LAYOUTS[layout])


def holds(
    find: Gradients, x: Tensor, grad: Tensor, eager: list[Tensor], exact: list[Tensor], slope: float
) -> None:
    """Asserts errors of at most twice eager's and two roundings, and the same bits at all levels.

    Args:
        slope: the largest |dy/dx| for fixed statistics. Their share may cancel that term.
    """
    ours = find(x, grad)
    narrow = EPSILON[torch.float32]
    assert ours[0].dtype == x.dtype
    assert ours[0].stride() == x.stride()
    for i, (found, plain, true) in enumerate(zip(ours, eager, exact, strict=True)):
        floor = 2 * narrow * grad.double().abs().sum().item()  # sums, whose terms may cancel
        if i == 0:
            floor = 2 * EPSILON[x.dtype] * true.abs().max().item()
            floor += 2 * narrow * slope * grad.abs().max().item()
        assert worst(found, true) <= 2 * worst(plain, true) + floor, i
    for level in LEVELS:
        with ops.isa(level):
            assert all(map(torch.equal, find(x, grad), ours)), level


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "per_sample", "elu"),
    cross_section(list(INPUTS), list(LAYOUTS), list(EPSILON), (False, True), (False, True)),
)
def test_instance_norm_plus(name, layout, dtype, per_sample, elu):
    x, grad = pair(name, dtype, layout)
    rows = parameters(*x.shape[:2], per_sample)

    def plain(compute: torch.dtype) -> list[Tensor]:
        at = (t.to(compute) for t in (grad, x, *rows))
        return list(reference.instance_norm_plus_backward(*at, elu=elu))

    def ours(x: Tensor, grad: Tensor) -> list[Tensor]:
        return list(gradients.instance_norm_plus(grad, x, *rows, elu=elu, eps=1e-5))

    variance = x.double().var(dim=(2, 3), correction=0)
    slope = (rows[1].abs() * (variance + 1e-5).rsqrt()).max().item()
    holds(ours, x, grad, plain(torch.float32), plain(torch.float64), slope)


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "variant", "activation"),
    cross_section(list(INPUTS), list(LAYOUTS), list(EPSILON), VARIANTS, ("none", "silu")),
)
def test_group_norm(name, layout, dtype, variant, activation):
    x, grad = pair(name, dtype, layout)
    named, groups = options(*x.shape[:2], variant), GROUPS[name]

    def plain(compute: torch.dtype) -> list[Tensor]:
        rows = {k: t.to(compute) for k, t in named.items()}
        found = reference.group_norm_backward(
            grad.to(compute), x.to(compute), groups, **rows, activation=activation
        )
        return [g for g in found if g is not None]

    def ours(x: Tensor, grad: Tensor) -> list[Tensor]:
        rows = (named.get(k) for k in ROWS)
        found = gradients.group_norm(grad, x, groups, *rows, activation=activation, eps=1e-5)
        return [g for g in found if g is not None]

    h = x.double() + named.get("add", torch.zeros(x.shape[:2]))[:, :, None, None]
    variance = h.reshape(len(x), groups, -1).var(dim=2, correction=0)
    largest = named.get("gamma", torch.ones(1)).abs().max()
    largest = largest * (1 + named.get("scale", torch.zeros(1))).abs().max()
    slope = (largest * (variance + 1e-5).rsqrt()).max().item()
    holds(ours, x, grad, plain(torch.float32), plain(torch.float64), slope)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_activations(name, dtype):
    x = torch.cat((torch.linspace(-30, 30, 12001), torch.tensor([-1e30, -0.0, 0.0, 1e-30, 1e30])))
    x = x.to(dtype)[None, None, None]
    grad = torch.full_like(x, 2.0)
    exact = 2.0 * ACTIVATIONS[name].backward(torch.ones_like(x).double(), x.double())
    for level in LEVELS:
        with ops.isa(level):
            ours = gradients.activation(grad, x, name)
        assert worst(ours, exact) <= 4 * EPSILON[dtype], level


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_not_a_number_and_infinity_arrive(name):
    x = torch.tensor([1.0, torch.nan, torch.inf, 2.0])[None, None, None]
    grad = torch.tensor([torch.nan, 1.0, 1.0, torch.inf])[None, None, None]
    ours, plain = gradients.activation(grad, x, name), ACTIVATIONS[name].backward(grad, x)
    assert torch.equal(ours.isnan()[..., [0, 3]], plain.isnan()[..., [0, 3]])
    if name not in ("none", "relu"):  # whose derivative at a NaN is a number
        assert ours[..., 1].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_threads_or_the_batch(layout):
    x, grad = noise_like(5, 70, 33, 17), noise_like(5, 70, 33, 17, seed=1)
    x, grad = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, grad))
    rows = options(5, 70, "all")

    def found(part: slice) -> Tensor:
        own = [rows[k] if rows[k].ndim == 1 else rows[k][part] for k in ROWS]
        return gradients.group_norm(
            grad[part], x[part], 7, *own, activation="silu", eps=1e-5
        )[0]  # fmt: skip

    whole, before = found(slice(None)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            _C.set_num_threads(threads)
            assert torch.equal(found(slice(None)), whole), threads
    finally:
        _C.set_num_threads(before)
    assert torch.equal(found(slice(3, 4)), whole[3:4])


def test_a_gradient_of_another_layout_and_a_view():
    x = noise_like(2, 6, 8, 10)
    rows, grad = parameters(2, 6), noise_like(2, 6, 8, 10, seed=1)
    expected = gradients.instance_norm_plus(grad, x, *rows, elu=True, eps=1e-5)
    twin = grad.contiguous(memory_format=torch.channels_last)
    for other in (twin, grad.double(), grad.flip(3).flip(3).transpose(2, 3).clone().mT):
        found = gradients.instance_norm_plus(other, x, *rows, elu=True, eps=1e-5)
        assert all(map(torch.equal, found, expected))
    view = torch.stack((x, x), dim=4)[..., 0]
    found = gradients.instance_norm_plus(grad, view, *rows, elu=True, eps=1e-5)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(
        gradients.activation(grad, view, "elu"), gradients.activation(twin, x, "elu")
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments(layout):
    x = INPUTS["large offset"]().contiguous(memory_format=LAYOUTS[layout])
    mean, variance = extension.channel_moments(x, -1).unbind(1)
    exact = x.double()
    torch.testing.assert_close(mean, exact.mean(dim=(2, 3)), rtol=1e-14, atol=0)
    true = exact.var(dim=(2, 3), correction=0)
    torch.testing.assert_close(variance, true, rtol=1e-6, atol=0)  # squares are float32 sums
    empty = extension.channel_moments(x[:0], -1)
    assert empty.shape == (0, 2, 32)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def calls(x: Tensor) -> dict[str, Tensor]:
    rows, named = parameters(2, 8), options(2, 8, "all")
    return {
        "instance_norm_plus": ops.instance_norm_plus(x, *rows, elu=True),
        "group_norm": ops.group_norm(x, 4, **named, activation="silu"),
        "activation": ops.activation(x, "elu"),
    }


@pytest.mark.parametrize("name", ["instance_norm_plus", "group_norm", "activation"])
def test_autograd_takes_the_kernels_and_the_reference_where_it_differentiates_again(name):
    x = noise_like(2, 8, 5, 7)
    kernels, plain, twice = leaf(x), leaf(x), leaf(x)
    with torch.profiler.profile() as profile:
        calls(kernels)[name].square().sum().backward()
    assert f"ncsn_fast::{name}_backward" in {event.name for event in profile.events()}
    with ops.backend("reference"):
        calls(plain)[name].square().sum().backward()
    torch.testing.assert_close(kernels.grad, plain.grad, rtol=1e-5, atol=1e-5)
    (first,) = torch.autograd.grad(calls(twice)[name].square().sum(), twice, create_graph=True)
    assert first.requires_grad
    torch.testing.assert_close(first, plain.grad, rtol=1e-5, atol=1e-5)


def test_activations_outside_training_are_pytorchs():
    x = noise_like(2, 3, 4, 5)
    assert torch.equal(ops.activation(x, "elu"), torch.nn.functional.elu(x))
    tangent = torch.ones_like(x)
    _, along = torch.func.jvp(lambda x: ops.activation(x, "silu"), (x,), (tangent,))
    torch.testing.assert_close(along, ACTIVATIONS["silu"].backward(tangent, x))
    for other in (x.double(), x[0], x.half()):
        y = ops.activation(leaf(other), "silu")
        assert torch.equal(y, torch.nn.functional.silu(other))
    with pytest.raises(ValueError, match="activation must be one of none, elu"):
        ops.activation(x, "swish")


def test_opcheck():
    x = noise_like(2, 4, 3, 5)
    torch.library.opcheck(torch.ops.ncsn_fast.activation.default, (leaf(x), "silu"))
    backward = torch.ops.ncsn_fast.activation_backward.default
    torch.library.opcheck(backward, (x, x, "elu"), test_utils="test_schema")
    rows = [options(2, 4, "add").get(k) for k in ROWS]
    norm = torch.ops.ncsn_fast.group_norm_backward.default
    for utility in ("test_schema", "test_faketensor"):
        torch.library.opcheck(norm, (x, x, 2, *rows, "silu", 1e-5), test_utils=utility)
