"""Concatenations whose operands are written in place: which are, and where they lie in memory."""

import engine_cases
import pytest
import torch

from ncsn_fast.engines.lowering.concatenation import write_in_place
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph, Map, Op, Slice
from ncsn_fast.engines.lowering.memory_plan import plan_memory

SKIP, UP = 3, 5  # channels of the two operands


def conv(g, name, x, channels, into=None):
    spec = ConvolutionSpec(torch.zeros(channels, x.channels, 1, 1), padding=0)
    return g.conv(name, x, spec, into=into)


def concat(g, *maps):
    y = Map(sum(x.channels for x in maps), maps[0].height, maps[0].width)
    g.ops.append(Op("concat", "concat", maps, (y,)))
    return y


def unet():
    """The skip is read again, what comes up is not."""
    g = Graph(2, 4, 4)
    skip = conv(g, "skip", g.input, SKIP)
    up = g.unary("silu", "up", conv(g, "middle", skip, UP), in_place=True)
    y = concat(g, up, skip)
    g.output = conv(g, "end", y, 2)
    return g, up, skip, y


def everything(op):
    return True


def names(graph):
    return [op.name for op in graph.ops]


def test_what_only_the_concatenation_reads_is_a_slice_of_it():
    g, up, _, y = unet()
    placed = write_in_place(g, everything)
    assert placed.slices == {up: Slice(y, 0)}
    assert names(placed) == names(g)  # the other is still copied
    assert not placed.ops[2].overwrites  # a map of pixels with gaps shares no other's memory
    assert not g.slices
    assert g.ops[2].overwrites


def test_a_concatenation_of_slices_alone_is_no_operation():
    g = Graph(2, 4, 4)
    y = concat(g, conv(g, "first", g.input, 3), conv(g, "second", g.input, 4))
    g.output = conv(g, "end", y, 2)
    placed = write_in_place(g, everything)
    assert names(placed) == ["first", "second", "end"]
    assert [each.first for each in placed.slices.values()] == [0, 3]


@pytest.mark.parametrize("case", ["kernel", "input", "output", "twice", "two outputs"])
def test_other_operands_are_copied(case):
    g = Graph(2, 4, 4)
    x = g.input if case == "input" else conv(g, "first", g.input, 2)
    if case == "two outputs":
        total, x = Map(2, 4, 4), Map(2, 4, 4)
        g.ops.append(Op("add_elu", "add", (g.input, g.input), (total, x)))
    maps = (x, x) if case == "twice" else (x, g.input)
    y = concat(g, *maps)
    g.output = x if case == "output" else y
    placed = write_in_place(g, lambda op: case != "kernel")
    assert not placed.slices
    assert placed.ops == g.ops


def test_a_slice_lies_in_its_map_which_lives_from_the_first_of_them():
    g, up, skip, y = unet()
    placed = write_in_place(g, everything)
    offsets, size = plan_memory(placed, 2, 4)
    assert offsets[up] == offsets[y]
    assert size <= plan_memory(g, 2, 4)[1]
    spans = engine_cases.lives(placed)
    spans[y] = [spans.pop(up)[0], spans[y][1]]
    bytes_of = {x: 2 * x.numel * 4 for x in spans}
    for a in spans:
        for b in spans:
            together = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
            apart = offsets[a] + bytes_of[a] <= offsets[b] or offsets[b] + bytes_of[b] <= offsets[a]
            assert a is b or not together or apart

    placed.slices = {up: Slice(y, SKIP)}
    assert plan_memory(placed, 2, 4)[0][up] == plan_memory(placed, 2, 4)[0][y] + 4 * SKIP
    assert skip in offsets
