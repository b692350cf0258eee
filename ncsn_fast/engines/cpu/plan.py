"""Plan of a network for the CPU: packed weights, one buffer for all feature maps, C++ steps."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn, steps
from ncsn_fast.engines.cpu.epilogues import with_epilogues
from ncsn_fast.engines.cpu.layers import can_be_product, can_be_tiles, can_be_winograd
from ncsn_fast.engines.cpu.memory import PlanMemory
from ncsn_fast.engines.cpu.padding import PaddedMap, border_of, with_padding
from ncsn_fast.engines.cpu.strip_sums import sums_among, with_strip_sums
from ncsn_fast.engines.lowering.concatenation import write_in_place
from ncsn_fast.engines.lowering.graph import AttentionSpec, ConvolutionSpec, Graph, Map, Op
from ncsn_fast.engines.lowering.memory_plan import OpCost
from ncsn_fast.engines.lowering.static_memory import Weights, network_input
from ncsn_fast.ops.activations import activation_code
from ncsn_fast.ops.addresses import NONE, array
from ncsn_fast.ops.cpu import WinogradWeights, winograd_pack
from ncsn_fast.ops.extension import forced_isa
from ncsn_fast.ops.tiles import TileWeights, tile_pack


class CpuPlan(PlanMemory):
    """A graph ready to run on `batch` images in one dtype.

    Args:
        weights: weights of another plan of the same network and dtype, to share; missing ones are
            copied from the network and packed.
        winograd: names of the 3x3 convolutions that run by Winograd's algorithm; True for all where
            it pays.
        products: names of the 1x1 convolutions that run as matrix products, and of the attention
            whose matrix products are in the maps' type; True for all.
        tiles: names of the convolutions that run in the tiles of AMX, with the activation that
            follows, sums for a norm that does, and the padding of maps that only they read; True
            for all that can.

    Attributes:
        input, output: (batch, C, H, W) channels-last, in the plan's buffer; valid between two runs.
        costs: kind, shape, FLOP and bytes of each step.
    """

    def __init__(
        self,
        graph: Graph,
        batch: int,
        dtype: torch.dtype,
        weights: Weights | None = None,
        *,
        winograd: Collection[str] | bool = False,
        products: Collection[str] | bool = False,
        tiles: Collection[str] | bool = False,
    ) -> None:
        known = {} if weights is None else weights

        def in_tiles(op: Op, spec: ConvolutionSpec) -> bool:
            packed = f"{op.name} (tiles)" in known
            return packed or (_is_in(tiles, op.name) and can_be_tiles(op, spec))

        def by_winograd(op: Op, spec: ConvolutionSpec) -> bool:
            packed = f"{op.name} (winograd)" in known  # weights keep their algorithm at every size
            chosen = op.name not in known and _is_in(winograd, op.name)
            return packed or (chosen and can_be_winograd(op, spec))

        def writes(op: Op) -> bool:
            if isinstance(spec := op.spec, ConvolutionSpec):
                return in_tiles(op, spec) or by_winograd(op, spec)
            return steps.writes_pixels(op)

        fused = with_strip_sums(with_epilogues(graph, in_tiles), in_tiles)
        placed = write_in_place(with_padding(fused, in_tiles), writes)
        super().__init__(placed, batch, dtype, known)
        self.products, self._in_tiles, self._by_winograd = products, in_tiles, by_winograd
        self.input, self.output = self.tensor(graph.input), self.tensor(graph.output)
        self._spans: list[int] = []  # steps of each operation
        self.costs = [self._add(op) for op in self.graph.ops]

    def load(self, x: Tensor, scale: float = 1.0, shift: float = 0.0) -> None:
        """Sets the network's input to scale * x + shift, as a sampler update does."""
        to, by = self.graph.scale, self.graph.shift
        self.input.copy_(network_input(x, scale * to, shift * to + by))

    def run(self) -> None:
        """Computes `output` from `input`."""
        self.steps.run(forced_isa.get())

    def set_conditions(self, *conditions: Tensor) -> None:
        """Sets the network's conditions, (batch,) each, and computes what depends on them only."""
        if self._by_level:
            levels = conditions[0].to("cpu", torch.int64).contiguous()
            self.steps.set_levels(array("levels", levels, (self.batch,), torch.int64), self.batch)
        self.set_vectors(*conditions)

    def profile(self) -> list[float]:
        """Runs the plan; returns the seconds of each operation."""
        seconds = iter(self.steps.profile(forced_isa.get()))
        return [sum(next(seconds) for _ in range(count)) for count in self._spans]

    def _add(self, op: Op) -> OpCost:
        kind, before = op.kind, len(self.steps)
        self._in_torch = False
        for y in op.outputs:
            if isinstance(y, PaddedMap):
                self.steps.zero_around(self.array(y), self.nhwc(y), y.border)
        if isinstance(op.spec, ConvolutionSpec):
            kind = self._add_convolution(op, op.spec)
        elif isinstance(op.spec, AttentionSpec) and self._takes_product(op):
            steps.attention_by_products(self, op)
            kind = "attention (products)"
        else:
            steps.add(self, op)
        if self._in_torch and kind != "torch":
            kind = f"{kind} (torch)"
        kind += _fused(op)
        self._spans.append(len(self.steps) - before)
        y = op.outputs[0]
        moved = sum(map(self.bytes, self._moved(op)))
        return OpCost(kind, op.name, self.shape(y), self.batch * op.flop, moved)

    def _moved(self, op: Op) -> tuple[Map, ...]:
        """Returns the maps that an operation reads and writes."""
        if op.kind != "concat":
            return (*op.inputs, *op.outputs)
        return 2 * tuple(x for x in op.inputs if x not in self.graph.slices)

    def _add_convolution(self, op: Op, spec: ConvolutionSpec) -> str:
        """Adds a convolution step and returns its kind."""
        if self._in_tiles(op, spec):
            self._add_tiles(op, spec)
            return "amx"
        if self._by_winograd(op, spec):
            self._add_winograd(op, spec)
            return "winograd"
        if f"{op.name} (product)" in self.weights or self._chooses_product(op, spec):
            self._add_product(op, spec)
            return "product"
        self._add_direct(op, spec)
        return "conv"

    def _add_direct(self, op: Op, spec: ConvolutionSpec) -> None:
        """Adds oneDNN's convolution, of copies in float32 where it has none in the maps' type."""
        x, y = op.inputs[0], op.outputs[0]
        if op.name not in self.weights:
            self.weights[op.name] = onednn.pack(spec, self.shape(x), self.arithmetic)
        source, target = self.tensor(x), self.tensor(y)
        if self.converts:
            source, target = self.wide(x, "input"), self.wide(y, "output")
            self.widen(x, source)
            if op.overwrites:
                self.widen(y, target)
        onednn.add(
            self.steps, op.name, spec, source, self.weights[op.name], target,
            clear=not op.overwrites,
        )  # fmt: skip
        if self.converts:
            self.narrow(y, target)

    def _chooses_product(self, op: Op, spec: ConvolutionSpec) -> bool:
        """Returns whether to use a matrix product; packed weights keep their algorithm."""
        if op.name in self.weights:
            return False
        return self._takes_product(op) and can_be_product(op, spec)

    def _takes_product(self, op: Op) -> bool:
        """Returns whether matrix products are wanted, and oneDNN has them in the maps' type."""
        return _is_in(self.products, op.name) and not self.converts

    def _add_product(self, op: Op, spec: ConvolutionSpec) -> None:
        maps = (op.inputs[0], op.outputs[0])
        x, y = (self.tensor(m).permute(0, 2, 3, 1).flatten(0, 2) for m in maps)
        matrix = spec.weight[:, :, 0, 0].t()
        weight, *bias = self.plain(f"{op.name} (product)", matrix, spec.bias)
        if op.overwrites or bias:
            onednn.product(self.steps, op.name, x, weight, y, y if op.overwrites else bias[0])
        else:
            each = (t[None, None] for t in (x, weight, y))
            onednn.products(self.steps, op.name, *each)

    def _add_winograd(self, op: Op, spec: ConvolutionSpec) -> None:
        x, y = op.inputs[0], op.outputs[0]
        key = f"{op.name} (winograd)"
        if key not in self.weights:
            packed = winograd_pack(spec.kernel().to("cpu", torch.float32), self.dtype)
            kept = [t for t in (packed.values, packed.scales) if t is not None]
            self.weights[key] = [*kept, *_float32_bias(spec)]
        values, *rest = self.weights[key]
        scales = rest.pop(0) if self.bfloat16 else None
        weights = WinogradWeights(values, scales, x.channels, y.channels)
        offsets = array("bias", rest[0], (y.channels,), torch.float32) if rest else NONE
        added = self.array(op.inputs[1]) if len(op.inputs) > 1 else NONE
        self.steps.winograd_conv(
            self.array(x), *weights.arrays(), offsets, added, self.target(y), self.nhwc(x),
            y.channels, spec.dilation, self.bfloat16,
        )  # fmt: skip

    def _add_tiles(self, op: Op, spec: ConvolutionSpec) -> None:
        x, y, sums = op.inputs[0], op.outputs[0], sums_among(op.outputs)
        last = op.outputs[-1 if sums is None else -2]
        key = f"{op.name} (tiles)"
        if key not in self.weights:
            packed = tile_pack(spec.kernel().to("cpu", torch.float32))
            self.weights[key] = [packed.values, *_float32_bias(spec)]
        values, *bias = self.weights[key]
        TileWeights(values, x.channels, y.channels, spec.taps).check()
        added = self.array(op.inputs[1]) if len(op.inputs) > 1 else NONE
        curved = bool(spec.activation) or isinstance(last, PaddedMap)  # the sum has no border
        self.steps.tile_conv(
            self.array(x), array("values", values, tuple(values.shape), torch.bfloat16),
            array("bias", bias[0], (y.channels,), torch.float32) if bias else NONE, added,
            NONE if curved and last is y else self.target(y),
            self.target(last) if curved else NONE, NONE if sums is None else self.array(sums),
            self.nhwc(x), y.channels, spec.taps, spec.dilation,
            activation_code(spec.activation or "none"), border_of(x), border_of(last),
        )  # fmt: skip


def _fused(op: Op) -> str:
    """Returns in brackets which steps of its neighbours an operation does, or has done for it."""
    told = {
        "padded input": any(isinstance(x, PaddedMap) for x in op.inputs),
        "given sums": sums_among(op.inputs) is not None,
        "sums": sums_among(op.outputs) is not None,
        "pads": any(isinstance(y, PaddedMap) for y in op.outputs),
    }
    words = ", ".join(word for word, applies in told.items() if applies)
    return f" ({words})" if words else ""


def _float32_bias(spec: ConvolutionSpec) -> list[Tensor]:
    bias = [] if spec.bias is None else [spec.bias]
    return [t.detach().to("cpu", torch.float32, copy=True) for t in bias]


def _is_in(names: Collection[str] | bool, name: str) -> bool:
    return names if isinstance(names, bool) else name in names
