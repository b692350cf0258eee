"""Activations in the convolutions that precede them, where one kernel computes both."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable

from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph, Op
from ncsn_fast.ops.activations import ACTIVATIONS


def with_epilogues(graph: Graph, covers: Callable[[Op, ConvolutionSpec], bool]) -> Graph:
    """Returns an equivalent graph in which convolutions end with the activation that follows.

    Such a convolution's outputs are its sum, if anything else reads it, and the activation, which
    is computed from the sum before it is rounded.

    Args:
        covers: whether a convolution can compute its activation.
    """
    readers = Counter(x for op in graph.ops for x in op.inputs)
    readers[graph.output] += 1
    fused = copy.copy(graph)
    fused.ops = []
    for op in graph.ops:
        before = fused.ops[-1] if fused.ops else None
        if before is not None and _ends_with(before, op, covers):
            fused.ops[-1] = _joined(before, op, keeps=readers[before.outputs[0]] > 1)
        else:
            fused.ops.append(op)
    return fused


def _ends_with(op: Op, then: Op, covers: Callable[[Op, ConvolutionSpec], bool]) -> bool:
    spec = op.spec
    if not isinstance(spec, ConvolutionSpec) or spec.activation:
        return False
    follows = then.kind in ACTIVATIONS and then.spec is None and then.inputs == op.outputs
    return follows and covers(op, spec)


def _joined(op: Op, activation: Op, *, keeps: bool) -> Op:
    assert isinstance(op.spec, ConvolutionSpec)
    (y,) = activation.outputs
    return dataclasses.replace(
        op,
        outputs=(*op.outputs, y) if keeps else (y,),
        overwrites=op.overwrites if keeps else tuple((y, x) for _, x in op.overwrites),
        spec=dataclasses.replace(op.spec, activation=activation.kind),
    )
