"""The table of activations: numbers in C++, derivatives, accuracy of the kernels."""

import math
import re

import pytest
import torch
from paths import ROOT

from ncsn_fast import _C, ops
from ncsn_fast.ops import cpu, reference
from ncsn_fast.ops.activations import ACTIVATIONS, activation_code

LEVELS = _C.isa_levels()


def test_the_numbers_are_those_of_the_header():
    header = (ROOT / "csrc/include/ncsn_fast/activation.h").read_text()
    enum = dict(re.findall(r"^    k(\w+) = (\d+),", header, re.MULTILINE))
    ours = {name.title().replace("_", ""): str(row.code) for name, row in ACTIVATIONS.items()}
    assert ours == enum
    assert f"kActivations = {len(ACTIVATIONS)};" in header


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].function(x).sum(), x)
    ones = torch.ones_like(x)
    torch.testing.assert_close(ACTIVATIONS[name].backward(ones, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(ACTIVATIONS[name].backward(ones, x), expected)


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    """The function in float64; PyTorch's own gelu loses all digits left of zero."""
    x = x.double()
    if name == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))
    if name == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return ACTIVATIONS[name].function(x)


# Largest relative errors left and right of zero, as the header states them.
BOUNDS = {name: (2.0**-22, 2.0**-22) for name in ACTIVATIONS}
BOUNDS |= {"gelu": (2.0**-20, 2.0**-20), "gelu_tanh": (2.0**-16, 2.0**-22)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_relative_accuracy_over_the_whole_range(name):
    x = torch.cat((torch.logspace(-12, 4.0, 40001), torch.linspace(0, 30, 60001)))
    for values, bound in zip((-x, x), BOUNDS[name], strict=True):
        y, truth = cpu.activation_out(values, torch.empty_like(values), name), exact(name, values)
        error = (y.double() - truth).abs()
        assert (error <= bound * truth.abs() + 2.0**-115).all()
        assert (truth.abs() > 2.0**-110).any() or name == "relu"
        for level in LEVELS:
            with ops.isa(level):
                assert torch.equal(cpu.activation_out(values, torch.empty_like(values), name), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinities_nans_and_zero(name, dtype):
    x = torch.tensor([torch.inf, torch.nan, 0.0, -0.0, 1e38, -1e38], dtype=dtype)
    y = cpu.activation_out(x, torch.empty_like(x), name)
    expected = reference.activation(x, name)
    if name == "gelu":  # PyTorch's depends on the number of elements
        expected[0] = torch.nan
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_names():
    assert activation_code("silu") == 3
    with pytest.raises(ValueError, match=r"none, elu, relu, silu.*; got 'mish'"):
        activation_code("mish")
