"""Passes that find attention in products and softmax."""

from __future__ import annotations

import dataclasses

from ncsn_fast.engines.lowering.graph import (
    AffineSpec,
    AttentionSpec,
    Graph,
    Op,
    ProductSpec,
    SoftmaxSpec,
    View,
)
from ncsn_fast.engines.lowering.rewriting import fold_all, producers_of, readers_of


def scale_softmax(graph: Graph) -> None:
    """Makes a number that all scores are multiplied by a part of their softmax."""
    fold_all(graph, _scaled)


def _scaled(first: Op, op: Op) -> Op | None:
    scale, softmax = first.spec, op.spec
    if not isinstance(scale, AffineSpec) or not isinstance(softmax, SoftmaxSpec):
        return None
    if scale.number is None:
        return None
    both = dataclasses.replace(softmax, scale=softmax.scale * scale.number)
    return dataclasses.replace(op, inputs=first.inputs, spec=both)


def fuse_attention(graph: Graph) -> None:
    """Makes softmax(scale q k^T) v one operation, where nothing else reads the scores."""
    producers, count = producers_of(graph), readers_of(graph)
    done: set[int] = set()
    for i, op in enumerate(graph.ops):
        softmax = producers.get(op.inputs[0]) if op.kind == "product" else None
        scores = producers.get(softmax.inputs[0]) if softmax is not None else None
        if softmax is None or scores is None:
            continue
        alone = count[softmax.outputs[0]] == count[scores.outputs[0]] == 1
        spec = _attention(scores, softmax, op) if alone else None
        if spec is not None:
            maps = (spec.query.map, spec.key.map, spec.value.map)
            name = op.name.removesuffix("product") + "attention"
            name = name if op.name.endswith("product") else op.name
            graph.ops[i] = Op("attention", name, maps, op.outputs, spec=spec)
            done |= {id(softmax), id(scores)}
    graph.ops = [op for op in graph.ops if id(op) not in done]


def _attention(scores: Op, softmax: Op, op: Op) -> AttentionSpec | None:
    first, middle, last = scores.spec, softmax.spec, op.spec
    if not isinstance(first, ProductSpec) or not isinstance(last, ProductSpec):
        return None
    heads, queries, keys = first.y.shape
    rows = (queries * keys, keys, 1)
    if not isinstance(middle, SoftmaxSpec) or middle.columns != keys:
        return None
    across = last.b.shape[2]
    key = dataclasses.replace(
        first.b,
        shape=(heads, keys, first.b.shape[1]),
        strides=(first.b.strides[0], first.b.strides[2], first.b.strides[1]),
    )
    fits = (
        last.a.shape == first.y.shape
        and _lies(first.y, rows)
        and _lies(last.a, rows)
        and _lies(last.y, (across, heads * across, 1))
        and all(map(is_read_as_tokens, (first.a, key, last.b)))
    )
    return AttentionSpec(first.a, key, last.b, middle.scale) if fits else None


def is_read_as_tokens(view: View) -> bool:
    """Whether a view (heads, L, d) is what attention takes.

    Vectors are contiguous, and one image's L tokens follow those of another.
    """
    _, length, width = view.shape
    return (width == 1 or view.strides[2] == 1) and view.map.numel == length * view.strides[1]


def _lies(view: View, strides: tuple[int, ...]) -> bool:
    same = zip(view.shape, view.strides, strides, strict=True)
    return view.offset == 0 and all(n == 1 or a == b for n, a, b in same)
