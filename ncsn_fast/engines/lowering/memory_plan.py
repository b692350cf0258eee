"""Memory planning (all feature maps of a graph in one buffer), and the tables of `describe`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ncsn_fast.engines.lowering.graph import Graph, Map
from ncsn_fast.ops.addresses import misalignment

ALIGNMENT = 256  # bytes, as in torch's allocators; more than any vector or cache line


@dataclasses.dataclass(frozen=True)
class OpCost:
    """FLOP and bytes of one operation of a plan, as `describe` prints them."""

    kind: str
    name: str
    shape: tuple[int, int, int, int]
    flop: float
    bytes: float


def aligned(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Allocates `size` zero bytes, aligned to ALIGNMENT."""
    memory = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=device)
    return memory[-misalignment(memory, ALIGNMENT) % ALIGNMENT :]


def plan_memory(graph: Graph, batch: int, element_size: int) -> tuple[dict[Map, int], int]:
    """Returns the offset in bytes of every map in one shared buffer, and the buffer's size.

    Maps that overwrite one another share memory from the birth of the first to the death of the
    last; among the others, none that live at the same time overlap. A slice lies in its map, which
    is born with the first of its slices. Greedy: largest maps first, each at the lowest offset that
    is free.
    """
    owner: dict[Map, Map] = {graph.input: graph.input}
    span: dict[Map, tuple[int, int]] = {graph.input: (0, len(graph.ops))}
    dead: set[Map] = set()
    for time, op in enumerate(graph.ops):
        for x in op.inputs:
            assert x not in dead, f"{op.name} reads a map that was overwritten"
            span[owner[x]] = (span[owner[x]][0], max(span[owner[x]][1], time))
        taken = dict(op.overwrites)
        dead |= set(taken.values())
        for y in op.outputs:
            within = graph.slices.get(y)
            owner[y] = owner[taken[y]] if y in taken else y if within is None else within.whole
            owner.setdefault(owner[y], owner[y])
            span.setdefault(owner[y], (time, time))
    span[owner[graph.output]] = (span[owner[graph.output]][0], len(graph.ops))

    def size(x: Map) -> int:
        return -(-x.elements(batch) * element_size // ALIGNMENT) * ALIGNMENT

    placed: dict[Map, int] = {}
    for x in sorted(span, key=size, reverse=True):
        offset = 0
        for y in sorted(placed, key=placed.__getitem__):
            apart = span[x][1] < span[y][0] or span[y][1] < span[x][0]
            if not apart and placed[y] < offset + size(x) and offset < placed[y] + size(y):
                offset = placed[y] + size(y)
        placed[x] = offset
    total = max(placed[x] + size(x) for x in placed)
    starts = {x: each.first * element_size for x, each in graph.slices.items()}
    return {x: placed[owner[x]] + starts.get(x, 0) for x in owner}, total


def format_profile(costs: list[OpCost], seconds: list[float], dtype: str) -> str:
    """Formats a profile: shape, milliseconds, GFLOP/s or GB/s, and share of each operation."""
    rows: list[tuple[str, ...]] = [
        ("operation", "name", "output (N, C, H, W)", "ms", "rate", "share")
    ]
    for cost, s in zip(costs, seconds, strict=True):
        amount, unit = (cost.flop, "GFLOP/s") if cost.flop else (cost.bytes, "GB/s")
        rate = f"{amount / s / 1e9:.0f} {unit}"
        share = f"{100 * s / sum(seconds):.1f}%"
        rows.append((cost.kind, cost.name, str(cost.shape), f"{1e3 * s:.3f}", rate, share))
    convolutions = [(cost.flop, s) for cost, s in zip(costs, seconds, strict=True) if cost.flop]
    flop, spent = sum(flop for flop, _ in convolutions), sum(s for _, s in convolutions)
    total = sum(seconds)
    told = f"{_table(rows)}\n{len(costs)} operations in {dtype}, {1e3 * total:.2f} ms"
    if convolutions:
        rate = f"{flop / spent / 1e9:.0f} GFLOP/s"
        told += f", {100 * spent / total:.1f}% of it convolutions at {rate}"
    in_torch = sum(s for cost, s in zip(costs, seconds, strict=True) if "torch" in cost.kind)
    return f"{told}, {100 * in_torch / total:.1f}% PyTorch's" if in_torch else told


def _table(rows: list[tuple[str, ...]]) -> str:
    """Formats rows as aligned columns, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
