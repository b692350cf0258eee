"""Operands of concatenations in plans for the CPU: written in place, with the bits of copies."""

import dataclasses

import networks
import own_networks
import pytest
import torch
import unets
from cross_section import SLOW, cross_section

from ncsn_fast import ops, wrap
from ncsn_fast.diffusion.parameterisation import DiscreteVP
from ncsn_fast.engines.cpu import plan as plans
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.graph import (
    AddSpec,
    ConvolutionSpec,
    Graph,
    GroupNormSpec,
    Map,
    Op,
    SquaresSpec,
)
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.static_engine import lowered
from ncsn_fast.models.unet import TimeUNet

LEVELS = ops.available()["isa_usable"]
BF16, F32 = torch.bfloat16, torch.float32
CHANNELS = 32


def conv(g, x, channels=CHANNELS, taps=1, into=None):
    generator = torch.Generator().manual_seed(len(g.ops))
    weight = torch.randn(channels, x.channels, taps, taps, generator=generator) / x.channels**0.5
    bias = None if into is not None else torch.randn(channels, generator=generator)
    spec = ConvolutionSpec(weight, bias, padding=taps // 2)
    return g.conv(f"conv{len(g.ops)}", x, spec, into=into)


def emit(g, kind, inputs, like=None, spec=None):
    y = dataclasses.replace(inputs[0] if like is None else like)
    g.ops.append(Op(kind, f"{kind}{len(g.ops)}", inputs, (y,), spec=spec))
    return y


def enlarged(g, x):
    return emit(g, "nearest2", (x,), Map(x.channels, 2 * x.height, 3 * x.width))


def squares(g, x):
    z = conv(g, x, 4 * x.channels)
    return emit(g, "depth_to_space", (z,), Map(x.channels, 11, 11), SquaresSpec(2, 1))


# What computes an operand, and how the plan runs its convolutions.
PRODUCERS = {
    "sum": (lambda g, x: emit(g, "add", (x, conv(g, g.input)), spec=AddSpec(0.6, 0.8)), {}),
    "sum and activation": (lambda g, x: emit(g, "add_silu", (x, conv(g, g.input))), {}),
    "activation": (lambda g, x: emit(g, "elu", (x,)), {}),
    "norm": (
        lambda g, x: emit(g, "group_norm", (x,), spec=GroupNormSpec(4, activation="silu")), {},
    ),
    "norm of tokens": (
        lambda g, x: emit(g, "layer_norm", (x,), spec=GroupNormSpec(1)), {},
    ),
    "upsampling": (enlarged, {}),
    "squares": (squares, {}),
    "winograd": (lambda g, x: conv(g, x, taps=3), {"winograd": True}),
    "winograd, added": (
        lambda g, x: conv(g, x, taps=3, into=conv(g, g.input)), {"winograd": True},
    ),
    "tiles": (lambda g, x: conv(g, x, taps=3), {"tiles": True}),
    "tiles, added": (lambda g, x: conv(g, x, into=conv(g, g.input)), {"tiles": True}),
    "tiles, activation": (lambda g, x: emit(g, "silu", (conv(g, x, taps=3),)), {"tiles": True}),
}  # fmt: skip


def graph_of(make):
    """Operands of some producer on either side of one that is copied."""
    g = Graph(3, 6, 6)
    first, second = (make(g, conv(g, g.input)) for _ in range(2))
    between = emit(g, "resize", (conv(g, g.input),), first)
    y = Map(3 * CHANNELS, first.height, first.width)
    g.ops.append(Op("concat", "concat", (first, between, second), (y,)))
    g.output = conv(g, y, 5)
    return g


@pytest.fixture
def copying(monkeypatch):
    """A function that makes plans which copy every operand."""

    def make(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "write_in_place", lambda graph, writes: graph)
            return CpuPlan(*arguments, **options)

    return make


def copies(plan):
    """Returns the maps that the concatenations of a plan copy."""
    each = [x for op in plan.graph.ops if op.kind == "concat" for x in op.inputs]
    return [x for x in each if x not in plan.graph.slices]


def outputs(made, x, *conditions):
    for plan in made:
        plan.load(x)
        plan.set_conditions(*conditions)
        plan.run()
    return [plan.output.clone() for plan in made]


@pytest.mark.parametrize(("name", "dtype"), cross_section([*PRODUCERS], [F32, BF16]))
def test_the_bits_are_those_of_copies_at_every_level(copying, name, dtype):
    make, options = PRODUCERS[name]
    options = {} if dtype is F32 and "tiles" in options else options
    graph = graph_of(make)
    made = [kind(graph, 2, dtype, **options) for kind in (CpuPlan, copying)]
    unable = "tiles" in name and dtype is F32 and "activation" not in name
    assert [len(copies(plan)) for plan in made] == [3 if unable else 1, 3]
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for level in (*LEVELS, *(["amx_emulated"] if options.get("tiles") else [])):
        with ops.isa(level):
            found, expected = outputs(made, x)
        assert expected.float().std() > 0.1
        assert torch.equal(found, expected), level


def shipped(make):
    """Returns the graph of a model, with inputs for it."""
    model = make()
    sizes = (model.config.channels, *model.config.image_size)
    seen = model.condition(torch.tensor([0.5], dtype=torch.float64))
    label = [torch.zeros(2, dtype=torch.int64)] if model.n_classes else []
    return lowered(model, model.config.image_size), sizes, [seen.expand(2).contiguous(), *label]


def ours(net, shape):
    time = torch.tensor([0.2, 0.7])
    return lower(net.eval(), shape, [torch.float32]), shape, [time]


# Networks: operands of all concatenations, and those that are copied with direct convolutions.
NETWORKS = {
    "diffusers": (lambda: shipped(lambda: own_networks.model("diffusers")), 8, 8),
    "user": (lambda: shipped(lambda: own_networks.model("unet")), 5, 3),
    "plain": (lambda: ours(networks.UNet(), (3, 16, 16)), 3, 3),
    "tutorial": (lambda: ours(TimeUNet("a"), (1, 28, 28)), 6, 3),
    "ncsnpp": (lambda: shipped(lambda: unets.model("ncsnpp")), 8, 4),
    "edm-ddpmpp": (lambda: shipped(lambda: unets.model("edm-ddpmpp")), 8, 4),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "user" else pytest.param(name, marks=SLOW) for name in NETWORKS],
)
def test_copies_that_are_left(copying, name):
    torch.manual_seed(0)
    make, every, left = NETWORKS[name]
    graph, shape, conditions = make()
    made = [kind(graph, 2, F32) for kind in (CpuPlan, copying)]
    found, expected = outputs(made, torch.rand(2, *shape), *conditions)
    assert torch.equal(found, expected)
    assert (len(copies(made[1])), len(copies(made[0]))) == (every, left)


@pytest.mark.slow
def test_our_convolutions_write_in_place_in_diffusers_unet(copying):
    """With Winograd's algorithm all that comes up is in place, but for what attention computes."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)

    net = UNet2DModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    options = {"predicts": "epsilon", "sees": "timestep", "process": DiscreteVP()}
    graph, shape, conditions = shipped(lambda: wrap(net, image_shape=(3, 16, 16), **options))
    for dtype in (F32, BF16):
        made = [kind(graph, 2, dtype, winograd=True) for kind in (CpuPlan, copying)]
        found, expected = outputs(made, torch.rand(2, *shape), *conditions)
        assert torch.equal(found, expected)
        assert (len(copies(made[1])), len(copies(made[0]))) == (8, 5)


def test_describe_names_the_copies_that_are_left():
    graph = graph_of(PRODUCERS["sum"][0])
    (cost,) = [cost for cost in CpuPlan(graph, 2, F32).costs if cost.kind == "concat"]
    n, channels, height, width = cost.shape
    assert (cost.name, channels) == ("concat", 3 * CHANNELS)
    assert cost.bytes == 2 * 4 * n * CHANNELS * height * width  # one of three is read and written
