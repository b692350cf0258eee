"""Each pass on graphs of a few operations, and what it must leave alone."""

import dataclasses

import engine_cases
import pytest
import torch
import torch.nn.functional as F

from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering import passes, sums
from ncsn_fast.engines.lowering.graph import (
    AddSpec,
    AffineSpec,
    AttentionSpec,
    ConvolutionSpec,
    Graph,
    GroupNormSpec,
    Map,
    NormSpec,
    Op,
    PadSpec,
    Vector,
    View,
)

ROW = torch.linspace(0.5, 1.5, 4)


def graph(channels=4, size=8):
    return Graph(channels, size, size)


def conv(g, x, name="conv", taps=3, **fields):
    generator = torch.Generator().manual_seed(len(g.ops))
    cin = x.channels // fields.get("groups", 1)
    weight = torch.randn(fields.pop("cout", 4), cin, taps, taps, generator=generator)
    bias = torch.randn(len(weight), generator=generator)
    spec = ConvolutionSpec(weight, bias, fields.pop("padding", taps // 2), **fields)
    return g.conv(name, x, spec)


def binary(g, name, a, b, kind="add", spec=None):
    y = dataclasses.replace(a)
    g.ops.append(Op(kind, name, (a, b), (y,), spec=spec))
    return y


def affine(g, x, scale=1.0, shift=0.0):
    return g.unary("affine", "affine", x, spec=AffineSpec(scale, shift))


def output(g, x):
    """Returns what a plan of the graph computes."""
    plan = CpuPlan(g, len(x), torch.float32)
    plan.load(x)
    plan.run()
    return plan.output.clone()


def kinds(g):
    return [op.kind for op in g.ops]


def names(g):
    return [op.name for op in g.ops]


def same(g, *applied):
    """Applies passes; asserts that the graph computes the same, on GPUs too, and returns it."""
    x = torch.rand(2, g.input.channels, g.input.height, g.input.width)
    with torch.inference_mode():
        before = output(g, x)
        passes.apply(g, applied)
        after = output(g, x)
        on_gpus = engine_cases.fused_output(g, x)
    assert (after - before).norm() <= 2e-6 * before.norm()
    assert (on_gpus - before).norm() <= 2e-6 * before.norm()
    return g


def test_dead_operations_are_removed():
    g = graph()
    g.output = conv(g, g.input, "read")
    conv(g, conv(g, g.input, "dead"), "dead too")
    assert names(same(g, passes.drop_dead)) == ["read"]


def test_a_scale_of_the_image_is_a_matter_of_loading_it():
    g = graph()
    g.output = conv(g, affine(g, affine(g, g.input, 2.0), 1.0, -1.0))
    assert kinds(same(g, passes.fold_input)) == ["conv"]
    assert (g.scale, g.shift) == (2.0, -1.0)


def test_a_scale_of_an_image_that_is_read_elsewhere_stays():
    g = graph()
    scaled = affine(g, g.input, 2.0)
    g.output = binary(g, "sum", scaled, g.input)
    assert kinds(same(g, passes.fold_input)) == ["affine", "add"]


def test_identities_are_removed():
    g = graph()
    x = affine(g, conv(g, g.input))
    g.ops.append(Op("resize", "resize", (x,), (y := Map(4, 8, 8),)))
    g.ops.append(Op("resize", "resize", (y,), (z := Map(4, 6, 6),)))
    g.output = z
    assert kinds(same(g, passes.drop_identities)) == ["conv", "resize"]


@pytest.mark.parametrize("scale", [0.5, ROW])
@pytest.mark.parametrize("shift", [0.0, ROW])
def test_an_affine_map_after_a_convolution_is_its_weights(scale, shift):
    g = graph()
    g.output = affine(g, affine(g, conv(g, g.input), scale, shift), 3.0)
    assert kinds(same(g, passes.fold_affine)) == ["conv"]


@pytest.mark.parametrize(("padding", "left"), [(0, ["conv"]), (1, ["affine", "conv"])])
def test_a_shift_before_a_convolution_is_its_bias_where_nothing_is_padded(padding, left):
    g = graph()
    x = g.unary("relu", "relu", g.input)
    g.output = conv(g, affine(g, x, ROW, ROW), padding=padding)
    assert kinds(same(g, passes.fold_affine)) == ["relu", *left]


def test_a_scale_before_a_convolution_is_its_weights():
    g = graph()
    g.output = conv(g, affine(g, g.unary("relu", "relu", g.input), ROW))
    assert kinds(same(g, passes.fold_affine)) == ["relu", "conv"]


def test_what_is_read_twice_is_not_folded():
    g = graph()
    x = conv(g, g.input)
    g.output = binary(g, "sum", affine(g, x, 2.0), x)
    assert kinds(same(g, passes.fold_affine)) == ["conv", "affine", "add"]


def test_an_affine_map_after_a_group_norm_is_its_parameters():
    g = graph()
    norm = g.unary("group_norm", "norm", g.input, spec=GroupNormSpec(2, ROW, -ROW))
    g.output = affine(g, norm, ROW, 2.0)
    assert kinds(same(g, passes.fold_affine)) == ["group_norm"]


def test_vectors_beside_a_group_norm_become_part_of_it():
    add, scale, shift = (Vector(4, None) for _ in range(3))
    g = graph()
    x = affine(g, g.input, 1.0, add)
    x = g.unary("group_norm", "norm", x, spec=GroupNormSpec(2))
    x = affine(g, affine(g, x, scale), 1.0, shift)
    g.output = g.unary("silu", "silu", x)
    passes.apply(g, [passes.absorb_vectors, passes.fuse_activations])
    (op,) = g.ops
    assert op.spec == GroupNormSpec(2, activation="silu", add=add, scale=scale, shift=shift)


def test_vectors_beside_a_layer_norm_stay():
    g = graph()
    x = g.unary("layer_norm", "norm", g.input, spec=GroupNormSpec(1))
    g.output = affine(g, x, Vector(4, None), Vector(4, None))
    passes.absorb_vectors(g)
    assert kinds(g) == ["layer_norm", "affine"]


def test_a_convolution_and_a_mean_are_one():
    g = graph()
    wide = g.unary("mean_pool2", "block.conv2.pool", conv(g, g.input, "block.conv2.conv"))
    narrow = conv(g, g.input, "block.shortcut.conv", taps=1)
    narrow = g.unary("mean_pool2", "block.shortcut.pool", narrow)
    g.output = binary(g, "sum", wide, narrow)
    same(g, passes.pool_convolutions)
    assert names(g) == ["block.conv2", "block.shortcut.pool", "block.shortcut.conv", "sum"]
    assert [op.spec.taps for op in g.ops if op.kind == "conv"] == [4, 1]


@pytest.mark.parametrize("fields", [{"dilation": 2, "padding": 2}, {"taps": 5}, {"stride": 2}])
def test_other_convolutions_keep_their_mean(fields):
    g = graph(size=16)
    g.output = g.unary("mean_pool2", "pool", conv(g, g.input, **fields))
    assert kinds(same(g, passes.pool_convolutions)) == ["conv", "mean_pool2"]


@pytest.mark.parametrize(
    ("border", "fields", "left"),
    [
        ((1, 1, 1, 1), {"padding": 0}, ["conv"]),
        ((0, 1, 0, 1), {"padding": 0, "stride": 2}, ["conv"]),
        ((2, 2, 2, 2), {"padding": 1}, ["conv"]),
        ((1, 0, 1, 0), {"padding": 0, "stride": 2}, ["pad", "conv"]),
        ((1, 1, 0, 0), {"padding": 0}, ["pad", "conv"]),
        ((0, 1, 0, 1), {"padding": 0, "dilation": 2}, ["pad", "conv"]),
    ],
)
def test_a_border_of_zeros_is_padding(border, fields, left):
    g = graph()
    a, b, c, d = border
    padded = Map(4, 8 + c + d, 8 + a + b)
    g.ops.append(Op("pad", "pad", (g.input,), (padded,), spec=PadSpec(*border)))
    g.output = conv(g, padded, **fields)
    assert kinds(same(g, passes.fold_padding)) == left


def test_activations_join_norms_and_affine_maps():
    g = graph()
    zeros = torch.zeros(4)
    spec = NormSpec((zeros, ROW, ROW), False, False, plus=False)
    x = g.unary("elu", "elu", g.unary("norm", "first", g.input, spec=spec))
    x = g.unary("silu", "silu", g.unary("norm", "second", x, spec=spec))
    x = g.unary("relu", "relu", affine(g, x, ROW, -ROW))
    g.output = g.unary("tanh", "tanh", x)
    assert kinds(same(g, passes.fuse_activations)) == ["norm", "group_norm", "affine", "tanh"]
    assert g.ops[0].spec.elu


def test_an_activation_of_what_is_read_elsewhere_stays():
    g = graph()
    norm = g.unary("group_norm", "norm", g.input, spec=GroupNormSpec(2))
    g.output = binary(g, "sum", g.unary("silu", "silu", norm), norm)
    assert kinds(same(g, passes.fuse_activations)) == ["group_norm", "silu", "add"]


def test_a_residual_sum_is_a_convolution_that_adds():
    g = graph()
    x = conv(g, g.input, "first")
    h = conv(g, g.unary("relu", "relu", x), "second")
    g.output = conv(g, binary(g, "sum", h, x), "last")
    assert names(same(g, sums.fuse_sums)) == ["first", "relu", "second", "last"]
    assert g.ops[2].inputs[1:] == (x,)


def test_the_shortcut_is_where_the_longer_way_adds():
    g = graph()
    h = conv(g, g.unary("relu", "relu", g.input), "second")
    g.output = binary(g, "sum", h, conv(g, g.input, "shortcut"))
    assert names(same(g, sums.fuse_sums)) == ["relu", "shortcut", "second"]


def test_nothing_is_added_to_a_map_that_is_read_later():
    g = graph()
    x = conv(g, g.input, "first")
    total = binary(g, "sum", conv(g, g.unary("relu", "relu", x), "second"), x)
    g.output = binary(g, "product", conv(g, total, "third"), x)
    same(g, sums.fuse_sums)
    adding = [op.name for op in g.ops if op.kind == "conv" and len(op.inputs) == 2]
    assert adding == ["third"]  # into x, when nothing reads it any more


def test_a_convolution_does_not_add_to_its_own_input():
    g = graph()
    x = g.unary("relu", "relu", g.input)
    g.output = binary(g, "sum", conv(g, x), x)
    assert kinds(same(g, sums.fuse_sums)) == ["relu", "conv", "add"]


def test_sums_of_sums_are_taken_together():
    """(x + path1) + path2, where path1 is read by path2 too, is (x + path2) + path1."""
    g = graph()
    x = g.unary("elu", "elu", g.input)
    path1 = conv(g, g.unary("max_pool5", "pool", x), "path1")
    total = binary(g, "sum", x, path1)
    path2 = conv(g, g.unary("max_pool5", "pool", path1), "path2")
    total = binary(g, "sum", total, path2)
    y = g.unary("elu", "after", total)
    g.output = binary(g, "end", conv(g, y, "last"), total)
    same(g, sums.fuse_sums, sums.fuse_added_activations, passes.reuse_memory)
    assert kinds(g) == ["elu", "max_pool5", "conv", "max_pool5", "conv", "add_elu", "conv"]
    assert g.ops[4].inputs[1] is x


def test_a_resized_map_is_added_where_it_is_written():
    g = graph()
    fine = conv(g, g.input, "fine")
    coarse = conv(g, g.unary("mean_pool2", "pool", g.input), "coarse")
    g.ops.append(Op("resize", "resize", (coarse,), (wide := Map(4, 8, 8),)))
    g.output = binary(g, "sum", fine, wide)
    assert kinds(same(g, sums.fuse_sums)) == ["conv", "mean_pool2", "conv", "resize_add"]


def test_numbers_become_weights_of_sums():
    g = graph()
    a, b = (g.unary(kind, kind, g.input) for kind in ("relu", "tanh"))
    total = binary(g, "sum", affine(g, a, 0.5), b)
    g.output = affine(g, affine(g, total, 2.0), 1.0, ROW)
    assert kinds(same(g, sums.weigh_sums)) == ["relu", "tanh", "add", "affine"]
    assert g.ops[2].spec == AddSpec(1.0, 2.0)


def test_an_activation_joins_the_sum_before_it():
    g = graph()
    a, b = (g.unary(kind, kind, g.input) for kind in ("relu", "tanh"))
    g.output = g.unary("silu", "silu", binary(g, "sum", a, b, spec=AddSpec(0.5, 2.0)))
    same(g, sums.fuse_added_activations, passes.reuse_memory)
    assert kinds(g) == ["relu", "tanh", "add_silu"]
    assert len(g.ops[2].outputs) == 1
    x = torch.rand(2, 4, 8, 8)
    with torch.inference_mode():
        expected = F.silu(0.5 * x.relu() + 2 * x.tanh())
        assert torch.allclose(output(g, x), expected, atol=1e-6)


def attention(g, maps, heads=2):
    q, k, v = (View(m, (heads, 64, 2), (2, 4, 1)) for m in maps)
    y = Map(4, 8, 8)
    g.ops.append(Op("attention", "attention", (*maps,), (y,), spec=AttentionSpec(q, k, v, 0.5)))
    return y


def test_queries_keys_and_values_are_one_convolution():
    g = graph()
    maps = [conv(g, g.input, f"block.to_{name}", taps=1) for name in "qkv"]
    g.output = attention(g, maps)
    same(g, passes.join_projections)
    assert names(g) == ["block.to_q+to_k+to_v", "attention"]
    assert g.ops[0].outputs[0].channels == 12


@pytest.mark.parametrize("case", ["another input", "read elsewhere", "3x3"])
def test_other_projections_stay(case):
    g = graph()
    other = g.unary("relu", "relu", g.input) if case == "another input" else g.input
    maps = [conv(g, g.input, name, taps=3 if case == "3x3" else 1) for name in "qk"]
    maps.append(conv(g, other, "v", taps=1))
    y = attention(g, maps)
    g.output = binary(g, "sum", y, maps[2]) if case == "read elsewhere" else y
    before = names(g)
    assert names(same(g, passes.join_projections)) == before


def test_memory_is_reused_where_nothing_reads_it_any_more():
    g = graph()
    x = conv(g, g.input)
    y = g.unary("relu", "relu", x)
    g.output = binary(g, "sum", g.unary("tanh", "tanh", y), y)
    same(g, passes.reuse_memory)
    assert [op.overwrites for op in g.ops] == [
        (),
        ((y, x),),
        (),
        ((g.output, g.ops[2].outputs[0]),),
    ]
