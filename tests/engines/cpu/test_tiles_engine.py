"""Networks whose convolutions run in the tiles of AMX, which are emulated on every machine."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from engine_cases import CPU, LEVELS, TYPES, lives, model
from tile_cases import excess

from ncsn_fast import ModelConfig, Sampler, ScoreModel, ops
from ncsn_fast.engines import precision
from ncsn_fast.engines.cpu import autotune, choice
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cpu.epilogues import with_epilogues
from ncsn_fast.engines.cpu.layers import TileLayer, can_be_tiles
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph, Map
from ncsn_fast.engines.lowering.memory_plan import plan_memory
from ncsn_fast.engines.static_engine import lowered
from ncsn_fast.models.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.delenv("NCSN_FAST_CONVOLUTIONS", raising=False)
    with ops.isa("amx_emulated"):
        yield


def engine(of, batch_size=2, **options):
    return CpuEngine(of, device=CPU, dtype="bf16", batch_size=batch_size, **options)


def kinds(plan):
    return Counter(cost.kind.partition(" (")[0] for cost in plan.costs)


@pytest.fixture(scope="module")
def graph():
    return lowered(model(), (16, 16))


@pytest.fixture(scope="module")
def built():
    with ops.isa("amx_emulated"):
        return engine(model(), convolutions="amx")


def test_a_network_is_within_the_bound_of_bfloat16(built, graph):
    assert 1e-3 < built.error <= precision.BOUNDS["bf16"]
    assert built.convolutions == "amx"
    found, direct = (
        kinds(plan) for plan in (built._plan((16, 16)), CpuPlan(graph, 2, torch.bfloat16))
    )
    assert found["amx"] > 5
    assert not found["winograd"]
    assert found["amx"] + found["conv"] == direct["conv"]
    assert found["elu"] < direct["elu"]  # the others are computed with their convolution


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_network_is_as_precise_as_with_direct_convolutions(arch):
    torch.manual_seed(0)
    fresh = ScoreModel(ModelConfig(arch=arch, image_size=(32, 32), ngf=32, n_sigmas=LEVELS))
    first, second = (engine(fresh, convolutions=name) for name in ("amx", "direct"))
    assert 1e-3 < first.error < 1.5 * second.error <= 1.5 * precision.BOUNDS["bf16"]


def prefix(graph, count, output):
    """Returns a plan of the first operations; those before it have the bits of the whole."""
    first = copy.copy(graph)
    first.ops, first.output = graph.ops[:count], output
    plan = CpuPlan(first, 2, torch.bfloat16, tiles=True)
    plan.load(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    if graph.condition is not None:
        plan.set_conditions(torch.zeros(2, dtype=torch.int64))
    with torch.inference_mode():
        plan.run()
    return plan.output.clone()


@pytest.mark.slow
def test_every_convolution_of_a_network_is_as_near_as_sums_in_float32_allow(graph):
    """What a network in tiles differs by from float32 is the rounding of its maps and weights."""
    layers = choice.Layers.of(graph).tiles
    for i, op in enumerate(graph.ops):
        if op.name in layers:
            x, *added = (prefix(graph, i, y) for y in op.inputs)
            total = prefix(graph, i + 1, op.outputs[0])
            weight, other = op.spec.kernel(), added[0] if added else None
            dilation = op.spec.dilation
            assert excess(total, x, weight, op.spec.bias, other, dilation=dilation) <= 0, op.name


def test_any_batch_and_size_has_the_same_bits(built):
    """Packed weights serve them all."""
    x = torch.rand(3, 3, 24, 8)
    whole = built.resized(3).output(x, None)
    assert torch.equal(built.resized(1).output(x[1:2], None), whole[1:2])
    level = next(name for name in ops.available()["isa_usable"] if name != "amx")
    with ops.isa(level):  # emulated there, too
        assert torch.equal(built.resized(1).output(x[1:2], None), whole[1:2])


def test_samples():
    sampler = Sampler(model(), engine="cpu", convolutions="amx", batch_size=2)
    assert sampler.dtype == "bf16"
    assert sampler.engine_for(2).choices == {"convolutions": "amx"}
    assert sampler.sample(2, method="cas", progress=False).isfinite().all()


def test_it_cannot_be_had_without_amx_or_bfloat16():
    with pytest.raises(ValueError, match="is for dtype='bf16'; got dtype='fp32'"):
        CpuEngine(model(), device=CPU, dtype="fp32", batch_size=1, convolutions="amx")
    with ops.isa("scalar"):
        for given in ("amx", "layers:0:1"):
            with pytest.raises(ValueError, match=f"'{given}' .* needs AMX, which is not used: "):
                engine(model(), convolutions=given)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Replaces timing: Winograd is 1.5 times as fast, tiles twice with 16 inputs; lists layers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune._layers.clear()
    layers = []

    def measure(layer, dtype, threads):
        layers.append(layer)
        return 1.5 if not isinstance(layer, TileLayer) else 2.0 if layer.inputs == 16 else 1.05

    monkeypatch.setattr(autotune, "_measure_layer", measure)
    yield layers
    autotune._layers.clear()


def test_the_fastest_algorithm_is_chosen_for_every_layer(timed, graph):
    layers = choice.Layers.of(graph)
    chosen = choice.choose(None, layers, "bf16", 1)
    plan = CpuPlan(
        graph, 1, torch.bfloat16, winograd=chosen.second, products=chosen.second,
        tiles=chosen.tiles,
    )  # fmt: skip
    found = {
        (cost.kind.partition(" (")[0], op.inputs[0].channels)
        for cost, op in zip(plan.costs, plan.graph.ops, strict=True)
    }
    assert {("amx", 16), ("winograd", 32)} <= found
    assert ("amx", 32) not in found
    assert len(timed) == len({*timed})
    text = choice.code(chosen, layers)
    assert text.count(":") == 2
    assert choice.choose(text, layers, "bf16", 1) == chosen
    with pytest.raises(ValueError, match=r"another of .* bits after a colon where there is AMX"):
        choice.choose(f"layers:0:{'f' * 40}", layers, "bf16", 1)


def test_tiles_are_not_even_timed_where_they_are_not_wanted(timed, graph):
    layers = choice.Layers.of(graph)
    level = next(name for name in ops.available()["isa_usable"] if name != "amx")
    with ops.isa(level):
        assert not choice.choose(None, layers, "bf16", 1).tiles
    assert not choice.choose(None, layers, "fp32", 1).tiles
    assert timed
    assert not any(isinstance(layer, TileLayer) for layer in timed)


def test_layers_are_really_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune._layers.clear()
    layers = {TileLayer(16, 16, 4, 4, 3, 1, normed) for normed in (False, True)}
    assert all(gain > 0 for gain in autotune.gains(layers, "bf16", 1).values())
    assert len(autotune.gains(layers, "bf16", 1)) == 2
    variants = {dtype: [a for d, a in autotune._variants() if d == dtype] for dtype in TYPES}
    assert variants["bf16"] == ["direct", "winograd", "amx"]
    assert variants["fp32"] == ["direct", "winograd"]
    autotune._layers.clear()


@pytest.mark.parametrize(("second", "tiled"), [("", ""), ("a", ""), ("", "b"), ("a", "b")])
def test_codes_are_read_as_they_are_written(second, tiled, graph):
    layers = choice.Layers.of(graph)
    some = choice.LayerChoice(
        frozenset([*layers.second][::2] if second else []),
        frozenset([*layers.tiles][1::2] if tiled else []),
    )
    text = choice.code(some, layers)
    assert (text == "direct") == (not second and not tiled)
    assert choice.is_code(text) == (text != "direct")
    assert choice.choose(text, layers, "bf16", 1) == some


def test_one_layer_is_computed_with_what_follows():
    """Accumulating into a map or not; the sum kept or not: against float64."""
    for adds, keeps in itertools.product((False, True), repeat=2):
        graph = Graph(32, 9, 20)
        weight = torch.randn(48, 32, 3, 3, generator=torch.Generator().manual_seed(0)) / 17
        spec = ConvolutionSpec(weight, torch.linspace(-1, 1, 48))
        point = ConvolutionSpec(torch.ones(48, 32, 1, 1) / 32, padding=0)
        into = graph.conv("first", graph.input, point) if adds else None
        y = graph.conv("conv", graph.input, spec, into=into)
        z = graph.unary("silu", "act", y, in_place=not keeps)
        graph.output = graph.conv("last", z, ConvolutionSpec(torch.ones(48, 48, 1, 1), padding=0),
                                  into=y if keeps else None)  # fmt: skip
        plan = CpuPlan(graph, 2, torch.bfloat16, tiles={"conv"})
        names = ["first"] * adds + ["conv", "last"]
        assert [op.name for op in plan.graph.ops] == names
        assert plan.graph.ops[-2].spec.activation == "silu"
        assert len(plan.graph.ops[-2].outputs) == 1 + keeps
        x = torch.randn(2, 32, 9, 20, generator=torch.Generator().manual_seed(1))
        plan.load(x)
        with torch.inference_mode():
            plan.run()
        exact = plan.input.double()
        total = torch.nn.functional.conv2d(
            exact, weight.bfloat16().double(), spec.bias.double(), padding=1
        )
        total = total + exact.mean(dim=1, keepdim=True) * adds
        wanted = torch.nn.functional.silu(total).sum(dim=1, keepdim=True) + total * keeps
        wanted = wanted.expand(2, 48, 9, 20)
        assert (plan.output - wanted).norm() <= precision.BOUNDS["bf16"] * wanted.norm()


def test_maps_of_convolutions_with_activations_lie_apart(graph):
    graph = with_epilogues(graph, can_be_tiles)
    assert any(len(op.outputs) == 2 and op.kind == "conv" for op in graph.ops)
    offsets, _ = plan_memory(graph, 3, 2)
    spans = lives(graph)
    size: dict[Map, int] = {x: 3 * x.numel * 2 for x in spans}
    for x, y in itertools.combinations(spans, 2):
        if spans[x][0] <= spans[y][1] and spans[y][0] <= spans[x][1]:
            assert offsets[x] + size[x] <= offsets[y] or offsets[y] + size[y] <= offsets[x]


@pytest.mark.parametrize("normed", [False, True])
def test_a_layer_is_timed_with_what_it_does_for_its_neighbours(normed):
    plan = CpuPlan(TileLayer(16, 24, 5, 6, 3, 1, normed).graph(), 1, torch.bfloat16, tiles=True)
    kinds = [cost.kind for cost in plan.costs]
    sums = ["amx (padded input, sums)", "norm (given sums)"]
    assert kinds == ["elu (pads)", *(sums if normed else ["amx (padded input)"])]


def test_layers_that_a_norm_follows_are_timed_with_it(graph):
    found = choice.Layers.of(graph).tiles
    for op in graph.ops:
        if op.name in found:
            norms = any(o.kind == "norm" and o.inputs == op.outputs for o in graph.ops)
            assert found[op.name].normed == norms
    assert {layer.normed for layer in found.values()} == {False, True}
