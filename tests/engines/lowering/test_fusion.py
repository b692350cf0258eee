"""The graph that a GPU runs: what is left between two convolutions, and where it lies."""

import itertools

import engine_cases
import pytest
import torch
import torch.nn.functional as F
import unets
from torch import nn

from ncsn_fast.engines.lowering.fusion import PIXEL, fuse
from ncsn_fast.engines.lowering.graph import (
    ConvolutionSpec,
    NormSpec,
    PointwiseSpec,
)
from ncsn_fast.engines.lowering.lower import lower
from ncsn_fast.engines.lowering.memory_plan import plan_memory
from ncsn_fast.engines.static_engine import lowered
from ncsn_fast.models.architectures import ARCHITECTURES


def graphs(arch, **fields):
    graph = lowered(engine_cases.model(arch, **fields), (16, 32))
    return graph, fuse(graph)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_convolutions_only_write(arch):
    graph, fused = graphs(arch)
    for op in fused.ops:
        if isinstance(op.spec, ConvolutionSpec):
            assert op.spec.bias is None
            assert len(op.inputs) == 1
            assert not op.overwrites
    assert fused.flop == graph.flop


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_bias_is_added_once(arch):
    """Biases may be added together; MSF's go to what reads the sum, both ends of a resize too."""
    graph, fused = graphs(arch)
    expected = [op.spec.bias for op in graph.ops if isinstance(op.spec, ConvolutionSpec)]
    found = [
        b
        for op in fused.ops
        if isinstance(op.spec, (NormSpec, PointwiseSpec))
        for b in op.spec.bias
    ]
    assert sorted(id(b) for b in found) == sorted(id(b) for b in expected if b is not None)


def test_there_is_one_pass_between_two_convolutions():
    """But for a sum that a norm reads, what two blocks read, and pools, which take whole maps."""
    graph, fused = graphs("ncsnv2")
    convolutions = sum(isinstance(op.spec, ConvolutionSpec) for op in fused.ops)
    passes = len(fused.ops) - convolutions
    assert convolutions == sum(isinstance(op.spec, ConvolutionSpec) for op in graph.ops) == 75
    assert passes == 87  # 17 norms, 8 pools, a mean and a resize; 60 sums and activations
    assert sum(op.kind == "pointwise" for op in fused.ops) == 60


@pytest.mark.parametrize("channels", [1, 3, 8, 9])
def test_the_ends_are_padded(channels):
    _, fused = graphs("ncsnv2", channels=channels)
    assert fused.input.channels == fused.output.channels == -(-channels // PIXEL) * PIXEL
    first, last = fused.ops[0], fused.ops[-2]
    assert (first.name, last.name) == ("begin_conv", "end_conv")
    assert first.spec.weight.shape[1] == last.spec.weight.shape[0] == channels


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_maps_that_live_together_lie_apart(arch):
    _, graph = graphs(arch)
    offsets, total = plan_memory(graph, 3, 2)
    spans = engine_cases.lives(graph)
    size = {x: 3 * x.channels * x.height * x.width * 2 for x in spans}
    for x, y in itertools.combinations(spans, 2):
        if spans[x][0] <= spans[y][1] and spans[y][0] <= spans[x][1]:
            assert offsets[x] + size[x] <= offsets[y] or offsets[y] + size[y] <= offsets[x]
    assert total < sum(size.values()) / 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_overwritten_is_not_read_again(arch):
    _, graph = graphs(arch)
    dead = set()
    for op in graph.ops:
        assert not dead & set(op.inputs), op.name
        taken = [x for _, x in op.overwrites]
        assert set(taken) <= set(op.inputs)
        assert len(set(taken)) == len(taken)
        dead |= set(taken)
    assert graph.input not in dead
    assert graph.output not in dead


class Style(nn.Module):
    """Two convolutions, and what a subclass computes between them."""

    def __init__(self, out=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.last = nn.GroupNorm(4, 8), nn.Conv2d(8, out, 3, padding=1)
        self.tokens = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Normalised(Style):
    def between(self, x):
        return F.silu(self.norm(x))


class Weighted(Style):
    def between(self, x):
        return F.gelu((x + 3 * self.second(F.relu(x))) / 2**0.5 - 0.25)


class Scaled(Style):
    def between(self, x):
        return F.silu(self.gain * F.tanh(x) + 0.5)


class Joined(Style):
    def between(self, x):
        h = F.interpolate(F.avg_pool2d(self.second(x), 2), scale_factor=2.0, mode="nearest")
        return self.second(torch.cat([h[:, :4], F.sigmoid(x)[:, 4:]], dim=1))


class Tokens(Style):
    def between(self, x):
        return self.tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("style", "kinds"),
    [
        (Normalised, ["conv", "group_norm", "conv", "pointwise"]),
        (Weighted, ["conv", "pointwise", "conv", "pointwise", "conv", "pointwise"]),
        (Scaled, ["conv", "pointwise", "affine", "conv", "pointwise"]),
        (Tokens, ["conv", "pointwise", "layer_norm", "conv", "pointwise"]),
    ],
)
def test_what_is_absorbed(style, kinds):
    """Biases and weights in the pass that follows; what takes whole maps gets whole maps."""
    graph = fuse(lower(style(), (3, 4, 8)))
    assert [op.kind for op in graph.ops] == kinds


@pytest.mark.parametrize("style", [Normalised, Weighted, Scaled, Joined, Tokens])
def test_it_is_the_same_network(style):
    net = style().eval()
    with torch.inference_mode():
        found = engine_cases.fused_output(lower(net, (3, 4, 8)), x := torch.rand(2, 3, 4, 8))
        expected = net(x)
    assert (found - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("ncsnpp-skip", "edm-adm") else pytest.mark.slow)
        for name in unets.TINY
    ],
)
def test_published_unets(name):
    of = unets.model(name)
    graph = lowered(of, of.config.image_size)
    u = torch.randn(2, *of.image_shape, generator=torch.Generator().manual_seed(0))
    condition = of.condition(of.sigmas[[1, -2]])
    labels = [torch.tensor([1, 0])] if of.n_classes else []
    with torch.inference_mode():
        found = engine_cases.fused_output(graph, u, condition, *labels)
        expected = of(u, condition, *labels)
    assert (found - expected).norm() <= 5e-6 * expected.norm()


class Ends(Style):
    """Reads the image twice, and adds it to what the last convolution computes."""

    def between(self, x):
        return F.silu(x)

    def forward(self, x):
        return super().forward(x) + 2 * x


class Grouped(Style):
    """The first convolution sees channels one by one, and the last output is read twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 9, 3, padding=1, groups=3)
        self.second = nn.Conv2d(9, 8, 1)

    def forward(self, x):
        y = self.last(self.second(self.first(x)))
        return y * 0.5 + torch.tanh(y)


@pytest.mark.parametrize("style", [Ends, Grouped])
def test_ends_that_more_than_convolutions_read_are_not_padded(style):
    net = style().eval()
    graph = lower(net, (3, 6, 6))
    assert fuse(graph).input.channels == fuse(graph).output.channels == 3
    with torch.inference_mode():
        found, expected = engine_cases.fused_output(graph, x := torch.rand(2, 3, 6, 6)), net(x)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
