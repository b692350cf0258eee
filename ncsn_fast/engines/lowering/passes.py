"""Passes over a graph: each returns an equivalent one, exactly so in real arithmetic.

Before `reuse_memory` no operation overwrites another's map, but for sums, which convolutions and
resizes add to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ncsn_fast.engines.lowering.graph import (
    ACTIVATIONS,
    AffineSpec,
    AttentionSpec,
    ConvolutionSpec,
    Factor,
    Graph,
    GroupNormSpec,
    Map,
    NormSpec,
    Op,
    PadSpec,
    Vector,
    View,
)
from ncsn_fast.engines.lowering.rewriting import (
    fold_all,
    fold_one,
    overwrite_inputs,
    producers_of,
    readers_of,
    with_maps,
)

Pass = Callable[[Graph], None]
_SUMS = ("add", *(f"add_{name}" for name in ACTIVATIONS))
_IN_PLACE = ("norm", "group_norm", "layer_norm", "affine", "softmax", *ACTIVATIONS, *_SUMS)


def apply(graph: Graph, passes: Iterable[Pass]) -> Graph:
    """Runs passes in order, in place; returns the graph."""
    for each in passes:
        each(graph)
    return graph


def drop_dead(graph: Graph) -> None:
    """Removes operations whose outputs nothing reads."""
    read, kept = {graph.output}, []
    for op in reversed(graph.ops):
        if read & {*op.outputs}:
            read |= {*op.inputs}
            kept.append(op)
    graph.ops = kept[::-1]


def fold_input(graph: Graph) -> None:
    """Makes an affine map of the image, such as 2x - 1, a matter of loading it."""
    while True:
        readers = [op for op in graph.ops if graph.input in op.inputs]
        if len(readers) != 1 or not isinstance(spec := readers[0].spec, AffineSpec):
            return
        if not isinstance(spec.scale, float) or not isinstance(spec.shift, float):
            return
        graph.scale = graph.scale * spec.scale
        graph.shift = graph.shift * spec.scale + spec.shift
        graph.ops.remove(readers[0])
        _rename(graph, {readers[0].outputs[0]: graph.input})


def drop_identities(graph: Graph) -> None:
    """Removes affine maps by 1 and 0, and resizes to the same size."""
    kept, renamed = [], dict[Map, Map]()
    for op in graph.ops:
        op = with_maps(op, renamed)
        x, y = op.inputs[0], op.outputs[0]
        same = (x.height, x.width) == (y.height, y.width)
        if (op.kind in ("resize", "nearest2") and same) or (
            isinstance(op.spec, AffineSpec) and op.spec.number == 1.0
        ):
            renamed[y] = x
        else:
            kept.append(op)
    graph.ops, graph.output = kept, renamed.get(graph.output, graph.output)


def fold_affine(graph: Graph) -> None:
    """Folds constant affine maps into each other, and into the convolutions beside them."""
    while fold_one(graph, _folded_before) or fold_one(graph, _folded_after):
        pass


def _folded_before(first: Op, op: Op) -> Op | None:
    """Folds a constant affine map into what comes before it."""
    before, spec = first.spec, op.spec
    if not isinstance(spec, AffineSpec):
        return None
    if isinstance(before, AffineSpec) and before.only_scales and spec.only_shifts:
        both = AffineSpec(before.scale, spec.shift)
        return dataclasses.replace(op, inputs=first.inputs, spec=both)
    if not spec.is_constant:
        return None
    scale, shift = spec.scale, spec.shift
    if isinstance(before, AffineSpec) and before.is_constant:
        product = AffineSpec(_times(before.scale, scale), _plus(_times(before.shift, scale), shift))
        return dataclasses.replace(op, inputs=first.inputs, spec=product)
    if isinstance(before, ConvolutionSpec) and len(first.inputs) == 1:
        weight, bias = before.weight.detach().double(), before.bias
        rows = _column(scale, before.channels)
        moved = rows * (0.0 if bias is None else bias.detach().double())
        moved = moved + _column(shift, before.channels)
        folded = dataclasses.replace(
            before,
            weight=(weight * rows[:, None, None, None]).float(),
            bias=None if bias is None and spec.only_scales else moved.float(),
        )
        return dataclasses.replace(first, outputs=op.outputs, spec=folded)
    if isinstance(before, GroupNormSpec) and not before.activation and not _modulated(before):
        rows = _column(scale, op.outputs[0].channels)
        gamma = rows if before.weight is None else before.weight.detach().double() * rows
        beta = _column(shift, len(rows))
        beta = beta if before.bias is None else before.bias.detach().double() * rows + beta
        norm = dataclasses.replace(before, weight=gamma.float(), bias=beta.float())
        return dataclasses.replace(first, outputs=op.outputs, spec=norm)
    return None


def _folded_after(first: Op, op: Op) -> Op | None:
    """Folds a constant scale, or a shift too where nothing is padded, into a convolution."""
    spec, after = first.spec, op.spec
    if not isinstance(spec, AffineSpec) or not spec.is_constant:
        return None
    if not isinstance(after, ConvolutionSpec) or after.groups != 1:
        return None
    if not spec.only_scales and after.padding:
        return None
    channels = op.inputs[0].channels
    weight = after.weight.detach().double()
    moved = (weight * _column(spec.shift, channels)[:, None, None]).sum((1, 2, 3))
    moved = moved + (0.0 if after.bias is None else after.bias.detach().double())
    folded = dataclasses.replace(
        after,
        weight=(weight * _column(spec.scale, channels)[:, None, None]).float(),
        bias=None if after.bias is None and spec.only_scales else moved.float(),
    )
    return dataclasses.replace(op, inputs=first.inputs, spec=folded)


def absorb_vectors(graph: Graph) -> None:
    """Makes what is added before a group norm, or scales and shifts it after, a part of it."""
    while fold_one(graph, _added_before) or fold_one(graph, _modulated_after):
        pass


def _added_before(first: Op, op: Op) -> Op | None:
    spec, norm = first.spec, op.spec
    if not isinstance(spec, AffineSpec) or not isinstance(norm, GroupNormSpec) or norm.add:
        return None
    if not spec.only_shifts or not isinstance(spec.shift, Vector) or op.kind != "group_norm":
        return None
    absorbed = dataclasses.replace(norm, add=spec.shift)
    return dataclasses.replace(op, inputs=first.inputs, spec=absorbed)


def _modulated_after(first: Op, op: Op) -> Op | None:
    norm, spec = first.spec, op.spec
    if not isinstance(norm, GroupNormSpec) or not isinstance(spec, AffineSpec):
        return None
    scale, shift = spec.scale, spec.shift
    if not (isinstance(scale, Vector) or spec.only_shifts) or norm.activation or norm.shift:
        return None
    if not (isinstance(shift, Vector) or spec.only_scales) or first.kind != "group_norm":
        return None
    if norm.scale and not spec.only_shifts:
        return None
    absorbed = dataclasses.replace(
        norm,
        scale=scale if isinstance(scale, Vector) else norm.scale,
        shift=shift if isinstance(shift, Vector) else None,
    )
    return dataclasses.replace(first, outputs=op.outputs, spec=absorbed)


def pool_convolutions(graph: Graph) -> None:
    """Makes a 3x3 convolution and a 2x2 mean one 4x4 convolution with stride 2.

    It has 16 taps instead of 36. A 1x1 convolution runs after the mean, on a quarter of the pixels.
    """
    producers, count = producers_of(graph), readers_of(graph)
    for i, pool in enumerate(graph.ops):
        conv = producers.get(pool.inputs[0]) if pool.kind == "mean_pool2" else None
        spec = conv.spec if conv is not None else None
        if conv is None or not isinstance(spec, ConvolutionSpec) or len(conv.inputs) > 1:
            continue
        plain = spec.stride == spec.dilation == 1 and not spec.pooled
        if not plain or spec.taps not in (1, 3) or count[conv.outputs[0]] > 1:
            continue
        at = graph.ops.index(conv)
        if spec.taps == 3:
            name = pool.name.removesuffix(".pool")
            name = name if conv.name.startswith(name) else conv.name
            spec = dataclasses.replace(spec, pooled=True, stride=2)
            graph.ops[i] = Op("conv", name, conv.inputs, pool.outputs, spec=spec)
            graph.ops[at] = _NOTHING
        elif not spec.padding:
            x, y = conv.inputs[0], pool.outputs[0]
            mean = Map(x.channels, y.height, y.width)
            graph.ops[at] = Op("mean_pool2", pool.name, (x,), (mean,))
            graph.ops[i] = dataclasses.replace(conv, inputs=(mean,), outputs=(y,))
    graph.ops = [op for op in graph.ops if op is not _NOTHING]


_NOTHING = Op("nothing", "", (), ())


def fold_padding(graph: Graph) -> None:
    """Makes a border of zeros the padding of the convolution that reads it.

    A border that is wider behind than before is even with one more tap, of zeros, in front.
    """
    fold_all(graph, _padded)


def _padded(first: Op, op: Op) -> Op | None:
    pad, spec = first.spec, op.spec
    if not isinstance(pad, PadSpec) or not isinstance(spec, ConvolutionSpec) or spec.pooled:
        return None
    before, after = {pad.left, pad.top}, {pad.right, pad.bottom}
    if len(before) > 1 or len(after) > 1 or (spec.dilation > 1 and before != after):
        return None
    front, behind = before.pop(), after.pop()
    if not 0 <= behind - front <= 1:
        return None
    more = behind - front
    weight = torch.nn.functional.pad(spec.weight.detach(), (more, 0, more, 0))
    folded = dataclasses.replace(
        spec, weight=weight if more else spec.weight, padding=spec.padding + behind
    )
    x, y = first.inputs[0], op.outputs[0]
    if (folded.size(x.height), folded.size(x.width)) != (y.height, y.width):
        return None
    return dataclasses.replace(op, inputs=(x,), spec=folded)


def fuse_activations(graph: Graph) -> None:
    """Makes an activation a part of the norm or the affine map before it."""
    fold_all(graph, _activated)


def _activated(first: Op, op: Op) -> Op | None:
    spec = first.spec
    if op.kind not in ACTIVATIONS or op.spec is not None:
        return None
    if isinstance(spec, NormSpec) and op.kind == "elu" and not spec.elu:
        return dataclasses.replace(
            first, outputs=op.outputs, spec=dataclasses.replace(spec, elu=True)
        )
    if isinstance(spec, NormSpec) and not spec.plus and not spec.elu:
        alpha, gamma, beta = spec.parameters
        norm = GroupNormSpec(len(alpha), gamma, beta, spec.eps, op.kind)
        return Op("group_norm", first.name, first.inputs, op.outputs, spec=norm)
    if isinstance(spec, (GroupNormSpec, AffineSpec)) and not spec.activation:
        return dataclasses.replace(
            first, outputs=op.outputs, spec=dataclasses.replace(spec, activation=op.kind)
        )
    return None


def join_projections(graph: Graph) -> None:
    """Makes the three 1x1 convolutions of an attention's queries, keys and values one."""
    producers, count = producers_of(graph), readers_of(graph)
    for i, op in enumerate(graph.ops):
        spec = op.spec
        if not isinstance(spec, AttentionSpec):
            continue
        convs = [producers.get(x) for x in op.inputs]
        views = (spec.query, spec.key, spec.value)
        alone = len({*op.inputs}) == 3 and all(count[x] == 1 for x in op.inputs)
        rows = all(v.strides[1] == v.map.channels and v.offset < v.strides[1] for v in views)
        joined = _joined(convs) if alone and rows else None
        if joined is None:
            continue
        first, *others = [conv for conv in convs if conv is not None]
        (y,) = joined.outputs
        moved, offset = [], 0
        for view in views:
            strides = (view.strides[0], y.channels, view.strides[2])
            moved.append(View(y, view.shape, strides, view.offset + offset))
            offset += view.map.channels
        q, k, v = moved
        attention = AttentionSpec(q, k, v, spec.scale)
        graph.ops[i] = dataclasses.replace(op, inputs=(y, y, y), spec=attention)
        graph.ops[graph.ops.index(first)] = joined
        for conv in others:
            graph.ops[graph.ops.index(conv)] = _NOTHING
    graph.ops = [op for op in graph.ops if op is not _NOTHING]


def _joined(convs: list[Op | None]) -> Op | None:
    """Returns one 1x1 convolution for several of one map; None if they are no such."""
    found = [(op, op.spec) for op in convs if op and isinstance(op.spec, ConvolutionSpec)]
    if len(found) < len(convs) or len({op.inputs for op, _ in found}) > 1:
        return None
    if any((s.taps, s.stride, s.groups, s.padding) != (1, 1, 1, 0) for _, s in found):
        return None
    biases = [spec.bias for _, spec in found]
    present = [bias.detach() for bias in biases if bias is not None]
    if len(present) not in (0, len(biases)):
        return None
    spec = ConvolutionSpec(
        torch.cat([s.weight.detach() for _, s in found]),
        torch.cat(present) if present else None,
        padding=0,
    )
    first = found[0][0]
    parts = "+".join(op.name.rpartition(".")[2] for op, _ in found[1:])
    y = dataclasses.replace(first.outputs[0], channels=spec.channels)
    return Op("conv", f"{first.name}+{parts}", first.inputs, (y,), spec=spec)


def reuse_memory(graph: Graph) -> None:
    """Lets outputs overwrite inputs that nothing reads afterwards, where kernels allow it."""
    overwrite_inputs(graph, _IN_PLACE)


def _rename(graph: Graph, names: dict[Map, Map]) -> None:
    graph.ops = [with_maps(op, names) for op in graph.ops]
    graph.output = names.get(graph.output, graph.output)


def _modulated(spec: GroupNormSpec) -> bool:
    return spec.scale is not None or spec.shift is not None


def _column(factor: Factor, channels: int) -> Tensor:
    assert not isinstance(factor, Vector)
    return torch.as_tensor(factor, dtype=torch.float64).detach().expand(channels)


def _times(a: Factor, b: Factor) -> Factor:
    assert not isinstance(a, Vector)
    assert not isinstance(b, Vector)
    return a * b


def _plus(a: Factor, b: Factor) -> Factor:
    assert not isinstance(a, Vector)
    assert not isinstance(b, Vector)
    return a + b
