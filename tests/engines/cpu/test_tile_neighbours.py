"""What convolutions in tiles and the steps around them do for each other, in plans for the CPU."""

import itertools

import pytest
import torch
from engine_cases import model
from tile_cases import noise_like, relative
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.engines.cpu import plan as plans
from ncsn_fast.engines.cpu.padding import PaddedMap
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.cpu.strip_sums import StripSums
from ncsn_fast.engines.lowering.graph import (
    ConvolutionSpec,
    Graph,
    GroupNormSpec,
    Map,
    NormSpec,
    Op,
)
from ncsn_fast.engines.static_engine import lowered
from ncsn_fast.ops import reference


@pytest.fixture(autouse=True)
def emulated():
    with ops.isa("amx_emulated"):
        yield


def spec(inputs: int, outputs: int, taps: int = 3, *, dilation: int = 1) -> ConvolutionSpec:
    weight = noise_like(outputs, inputs, taps, taps, seed=outputs) / (inputs * taps**2) ** 0.5
    bias = torch.linspace(-1, 2, outputs)
    return ConvolutionSpec(weight, bias, padding=dilation * (taps // 2), dilation=dilation)


def norm(graph: Graph, kind: str, x: Map) -> Map:
    """Appends IN++ with ELU, an instance norm, or a group norm with SiLU."""
    parameters = [noise_like(x.channels, seed=k) + 0.3 for k in range(3)]
    name = f"norm {len(graph.ops)}"
    if kind == "group_norm":
        groups = next(g for g in (8, 5, 3, 1) if x.channels % g == 0)
        how = GroupNormSpec(groups, *parameters[:2], activation="silu")
        return graph.unary("group_norm", name, x, spec=how)
    if kind == "instance norm":
        parameters[0] = torch.zeros(x.channels)
    return graph.unary("norm", name, x, spec=NormSpec(tuple(parameters), False, kind == "IN++"))


def exact_norm(op: Op, x: Tensor) -> Tensor:
    how = op.spec
    if isinstance(how, GroupNormSpec):
        parameters = (how.weight.double(), how.bias.double())
        return reference.group_norm(
            x.double(), how.groups, *parameters, activation=how.activation, eps=how.eps
        )
    return reference.instance_norm_plus(
        x.double(), *(p.double() for p in how.parameters), elu=how.elu, eps=how.eps
    )


def run(plan: CpuPlan) -> Tensor:
    x = plan.graph.input
    plan.load(noise_like(plan.batch, x.channels, x.height, x.width, seed=9))
    with torch.inference_mode():
        plan.run()
    return plan.output.clone()


def told(plan: CpuPlan) -> list[str]:
    return [cost.kind for cost in plan.costs]


@pytest.fixture
def without(monkeypatch):
    """Returns a function that leaves a pass out."""
    return lambda name: monkeypatch.setattr(plans, name, lambda graph, in_tiles: graph)


SIZES = [(32, 8, 16, 2), (40, 13, 7, 3), (17, 9, 20, 1), (64, 1, 1, 2)]


@pytest.mark.parametrize("kind", ["IN++", "instance norm", "group_norm"])
@pytest.mark.parametrize(("channels", "height", "width", "batch"), SIZES)
def test_a_convolution_computes_the_statistics_of_the_norm(
    kind, channels, height, width, batch, without
):
    """Of the rounded sum, residual included; as precise as the norm's own."""
    graph = Graph(24, height, width)
    first = graph.conv("first", graph.input, spec(24, channels, 1))
    y = graph.conv("conv", graph.input, spec(24, channels), into=first)
    graph.output = norm(graph, kind, y)
    plan = CpuPlan(graph, batch, torch.bfloat16, tiles=True)
    name = "group_norm" if kind == "group_norm" else "norm"
    assert told(plan) == ["amx", "amx (sums)", f"{name} (given sums)"]
    own = plan.graph.ops[-1]
    found, read = run(plan), plan.tensor(own.inputs[0]).clone()
    without("with_strip_sums")
    other = CpuPlan(graph, batch, torch.bfloat16, tiles=True)
    assert told(other) == ["amx", "amx", name]
    unfused, exact = run(other), exact_norm(own, read)
    assert torch.equal(other.tensor(own.inputs[0]), read)
    assert relative(found, exact) <= 1.02 * relative(unfused, exact) + 1e-5
    assert relative(found, unfused.double()) < 1e-3


def test_norms_get_the_sums_of_their_own_map_and_only_of_sums():
    """Two norms of one map; one of another; not of an activation, nor of what is no convolution."""
    graph = Graph(32, 6, 10)
    y = graph.conv("a", graph.input, spec(32, 32))
    one, two = norm(graph, "IN++", y), norm(graph, "group_norm", y)
    curved = graph.unary("silu", "act", graph.conv("b", one, spec(32, 32)), in_place=True)
    three = norm(graph, "IN++", curved)
    direct = graph.conv("direct", two, spec(32, 48))
    four = norm(graph, "IN++", direct)
    graph.output = Map(112, 6, 10)
    graph.ops.append(Op("concat", "concat", (two, three, four), (graph.output,)))
    plan = CpuPlan(graph, 2, torch.bfloat16, tiles={"a", "b"})
    assert told(plan) == [
        "amx (sums)", "norm (given sums, pads)", "group_norm (given sums)", "amx (padded input)",
        "norm", "conv", "norm", "concat",
    ]  # fmt: skip
    sums = [m for op in plan.graph.ops for m in op.outputs if isinstance(m, StripSums)]
    assert [op.inputs[1:] for op in plan.graph.ops[1:3]] == [(sums[0],), (sums[0],)]


def padding_graph(into: str) -> Graph:
    """Returns one way to write a map that two convolutions in tiles read."""
    graph = Graph(40, 9, 14)
    x, channels = graph.input, 40
    if into in ("IN++", "instance norm", "group_norm"):
        y = norm(graph, into, x)
    elif into in ("elu", "silu", "max_pool5", "avg_pool5"):
        y = graph.unary(into, "act", x)
    elif into in ("conv", "conv silu", "conv silu kept"):
        channels = 33
        s = y = graph.conv("before", x, spec(40, channels))
        if into != "conv":
            y = graph.unary("silu", "act", s, in_place=into == "conv silu")
    else:
        s, y = Map(40, 9, 14), Map(40, 9, 14)
        other = graph.unary("relu", "other", x)
        outputs = (s, y) if into == "add_elu kept" else (y,)
        kind = into.partition(" ")[0]
        graph.ops.append(Op(kind, "sum", (x, other), outputs))
    one = graph.conv("one", y, spec(channels, 32))
    kept = into.endswith("kept")
    two = graph.conv("two", y, spec(channels, 32, dilation=2), into=one)
    graph.output = Map(32 + (s.channels if kept else 0), 9, 14)
    graph.ops.append(Op("concat", "concat", (two, s) if kept else (two,), (graph.output,)))
    return graph


WRITERS = (
    "IN++", "instance norm", "group_norm", "elu", "silu", "max_pool5", "avg_pool5", "conv",
    "conv silu", "conv silu kept", "add", "add_silu", "add_elu kept",
)  # fmt: skip


@pytest.mark.parametrize("into", WRITERS)
def test_maps_are_padded_where_they_are_written(into, without):
    """With the bits of copies, as far as the farther of two readers reads."""
    graph = padding_graph(into)
    plan = CpuPlan(graph, 3, torch.bfloat16, tiles=True)
    (y,) = {x for op in plan.graph.ops for x in op.outputs if isinstance(x, PaddedMap)}
    assert y.border == 2
    kinds = told(plan)
    assert [kind for kind in kinds if kind.startswith("amx")][-2:] == ["amx (padded input)"] * 2
    assert sum(kind.endswith("(pads)") for kind in kinds) == 1
    found, again = run(plan), run(plan)
    assert torch.equal(found, again)
    without("with_padding")
    copied = CpuPlan(graph, 3, torch.bfloat16, tiles=True)
    assert not any("pad" in kind for kind in told(copied))
    assert torch.equal(found, run(copied))


@pytest.mark.parametrize("other", ["pool", "direct", "into", "output"])
def test_maps_that_others_read_stay_dense(other):
    graph = Graph(32, 8, 8)
    y = graph.unary("elu", "act", graph.input)
    z = graph.conv("conv", y, spec(32, 32))
    if other == "pool":
        graph.output = graph.unary("max_pool5", "pool", y)
    elif other == "direct":
        graph.output = graph.conv("direct", y, spec(32, 32))
    elif other == "into":
        graph.output = graph.conv("last", z, spec(32, 32), into=y)
    else:
        graph.output = y
    plan = CpuPlan(graph, 2, torch.bfloat16, tiles={"conv", "last"})
    assert not isinstance(plan.graph.ops[0].outputs[0], PaddedMap)
    assert told(plan)[:2] in (["elu", "amx"], ["elu", "amx (pads)"])


def test_the_zeros_of_padded_maps_are_written_at_every_run():
    """Their memory is that of other maps before, whose pixels lie elsewhere; or holds anything."""
    graph = Graph(32, 8, 8)
    x = graph.input
    for i, (channels, dilation) in enumerate([(40, 1), (33, 2), (64, 1), (32, 4), (32, 1)]):
        x = graph.unary("elu", f"act{i}", x)
        x = graph.conv(f"conv{i}", x, spec(x.channels, channels, dilation=dilation))
    graph.output = x
    plan = CpuPlan(graph, 2, torch.bfloat16, tiles=True)
    spans = [
        (plan._offsets[y], plan._offsets[y] + plan.bytes(y))
        for op in plan.graph.ops for y in op.outputs if isinstance(y, PaddedMap)
    ]  # fmt: skip
    assert len({*spans}) > 2
    assert any(a < d and c < b for (a, b), (c, d) in itertools.combinations({*spans}, 2))
    found = run(plan)
    plan._buffer.fill_(0xFF)  # NaNs
    assert torch.equal(run(plan), found)


@pytest.fixture(scope="module")
def network() -> Graph:
    return lowered(model(), (16, 16))


def test_a_network_uses_both(network, without):
    plan = CpuPlan(network, 3, torch.bfloat16, tiles=True)
    kinds = told(plan)
    assert sum("given sums" in kind for kind in kinds) > 5
    assert sum("padded input" in kind for kind in kinds) > 5
    found = run(plan)
    without("with_padding")
    assert torch.equal(run(CpuPlan(network, 3, torch.bfloat16, tiles=True)), found)
    without("with_strip_sums")
    unfused = run(CpuPlan(network, 3, torch.bfloat16, tiles=True))
    assert 0 < relative(found, unfused.double()) < 2e-2


def test_a_network_has_the_same_bits_with_any_threads_and_batch(network):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(CpuPlan(network, 2, torch.bfloat16, tiles=True)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
