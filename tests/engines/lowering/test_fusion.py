"""The graph that a GPU runs: what is left between two convolutions, and where it lies."""

import itertools

import engine_cases
import pytest

from ncsn_fast.engines.lowering.fusion import PIXEL, check_fusable, fuse
from ncsn_fast.engines.lowering.graph import (
    ConvolutionSpec,
    NormSpec,
    PointwiseSpec,
    UnsupportedNetwork,
)
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


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"act": "swish"}, r"the operation silu \(\S+\)"),
        ({"norm": "BatchNorm"}, r"the operation affine \(res1\.0\.normalize1\)"),
        ({"norm": "VarianceNorm"}, r"the operation torch \(res1\.0\.normalize1\.\S+\)"),
    ],
)
def test_what_the_gpu_does_not_run_is_named(fields, part):
    graph = lowered(engine_cases.model("ncsnv2", **fields), (16, 32))
    with pytest.raises(UnsupportedNetwork, match=part):
        check_fusable(graph)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_published_networks_are_run_by_the_gpu(arch):
    check_fusable(lowered(engine_cases.model(arch), (16, 32)))
