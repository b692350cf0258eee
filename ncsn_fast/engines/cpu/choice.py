"""The algorithm of every layer of a network: chosen by timing, forced, or had again from a code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from ncsn_fast.engines.cpu import autotune
from ncsn_fast.engines.cpu.layers import (
    AnyLayer,
    Layer,
    TileLayer,
    layer_of,
    tile_layer_of,
)
from ncsn_fast.engines.cpu.strip_sums import read_by_norms
from ncsn_fast.engines.lowering.graph import Graph
from ncsn_fast.ops import tiles

_PREFIX = "layers:"


@dataclasses.dataclass(frozen=True)
class Layers:
    """The operations of a network that have a choice, by their names.

    Attributes:
        second: those with a second algorithm (Winograd, matrix products).
        tiles: those that can run in the tiles of AMX.
    """

    second: Mapping[str, AnyLayer]
    tiles: Mapping[str, TileLayer]

    @classmethod
    def of(cls, graph: Graph) -> Layers:
        """Finds them."""
        second = {op.name: layer for op in graph.ops if (layer := layer_of(op)) is not None}
        normed = read_by_norms(graph)
        tiled: dict[str, TileLayer] = {}
        for op in graph.ops:
            layer = tile_layer_of(op, normed=op.outputs[0] in normed)
            if layer is not None:
                tiled[op.name] = layer
        return cls(second, tiled)

    @property
    def winograd(self) -> frozenset[str]:
        """Names of those that Winograd's algorithm covers."""
        return frozenset(name for name, layer in self.second.items() if isinstance(layer, Layer))


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """Names of the operations that run by their second algorithm, and in tiles; none is in both."""

    second: frozenset[str] = frozenset()
    tiles: frozenset[str] = frozenset()


def choose(given: str | None, layers: Layers, dtype: str, threads: int | None) -> LayerChoice:
    """Returns the choice for a name or a code; for None the fastest one, as `autotune` timed it.

    Raises:
        ValueError: it is neither, or a code of another network, or cannot be had here.
    """
    if given is None:
        return _fastest(layers, dtype, threads)
    if given == "amx":
        _check_tiles(given, dtype)
        return LayerChoice(tiles=frozenset(layers.tiles))
    if given in autotune.ALGORITHMS:
        return LayerChoice(layers.winograd if given == "winograd" else frozenset())
    parts = [int(part, 16) for part in given.split(":")[1:]] if is_code(given) else [-1]
    second, tiled = (*parts, 0)[:2]
    if not 0 <= second < 1 << len(layers.second) or not tiled < 1 << len(layers.tiles):
        names = ", ".join(map(repr, autotune.ALGORITHMS))
        raise ValueError(
            f"convolutions (or NCSN_FAST_CONVOLUTIONS) must be one of {names}, or layers:NUMBER "
            f"with a hexadecimal number of {len(layers.second)} bits, and with another of "
            f"{len(layers.tiles)} bits after a colon where there is AMX; got {given!r}"
        )
    if tiled:
        _check_tiles(given, dtype)
    return LayerChoice(_bits(second, layers.second), _bits(tiled, layers.tiles))


def code(choice: LayerChoice, layers: Layers) -> str:
    """Returns a choice as text: an algorithm for all layers, or numbers with a bit for each."""
    if not choice.second | choice.tiles:
        return "direct"
    if choice == LayerChoice(layers.winograd):
        return "winograd"
    if choice == LayerChoice(tiles=frozenset(layers.tiles)):
        return "amx"
    second = f"{_PREFIX}{_number(choice.second, layers.second):x}"
    return second + (f":{_number(choice.tiles, layers.tiles):x}" if choice.tiles else "")


def is_code(value: Any) -> bool:
    """Whether a value is one of `code` that names no algorithm."""
    pattern = f"{_PREFIX}[0-9a-f]{{1,400}}(:[0-9a-f]{{1,400}})?"
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _fastest(layers: Layers, dtype: str, threads: int | None) -> LayerChoice:
    tiled: Mapping[str, TileLayer] = {}
    if dtype == "bf16" and tiles.level() is not None:
        tiled = layers.tiles
    timed: set[AnyLayer] = {*layers.second.values(), *tiled.values()}
    gains = autotune.gains(timed, dtype, threads)
    other = {name: gains[layer] for name, layer in layers.second.items()}
    least = {name: max(autotune.GAIN, other.get(name, 0.0)) for name in tiled}
    faster = frozenset(name for name, layer in tiled.items() if gains[layer] >= least[name])
    second = frozenset(name for name, gain in other.items() if gain >= autotune.GAIN)
    return LayerChoice(second - faster, faster)


def _check_tiles(given: str, dtype: str) -> None:
    """Raises unless convolutions of this dtype can run in tiles here."""
    what = f"convolutions={given!r} (or NCSN_FAST_CONVOLUTIONS)"
    if dtype != "bf16":
        raise ValueError(f"{what} is for dtype='bf16'; got dtype={dtype!r}")
    if tiles.level() is None:
        raise ValueError(f"{what} needs AMX, which is {tiles.state()}; leave it out")


def _bits(number: int, names: Collection[str]) -> frozenset[str]:
    return frozenset(name for i, name in enumerate(names) if number >> i & 1)


def _number(chosen: frozenset[str], names: Collection[str]) -> int:
    return sum(1 << i for i, name in enumerate(names) if name in chosen)
