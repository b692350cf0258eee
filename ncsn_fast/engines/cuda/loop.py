"""Sampling loop on a GPU: network and update, row after row, on static memory.

A captured graph fixes addresses and launch shapes, so everything that differs between rows, calls
or seeds lies in device memory: the program's rows, the counter of the next row, the trained level
of each row, the noise keys and the state. One graph serves them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ncsn_fast.engines.cuda.graphs import Graphs
from ncsn_fast.engines.cuda.kernels import Kernels
from ncsn_fast.kernels.rows import ROW_WIDTH, Rows, new_rows
from ncsn_fast.samplers.program import Chains, Program

MAX_UNROLLED = 32  # rows in one graph of a level; longer levels replay it
MAX_NODES = 250_000  # in the graph of a whole loop: some 64 KB of host memory per thousand
_MIN_ROWS = 8192  # initial capacity, enough for all published samplers; half a megabyte


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Numbers that a plan computes of its level alone, the same for all images: embeddings, mostly.

    Attributes:
        memory: (M,) float32, where the plan reads it.
        first: (W,), places in it of the first image's numbers.
        columns: (M,), which of these each place has.
        compute: sets `memory` from the plan's level.
        run: computes the plan's output from its input and `memory`.
    """

    memory: Tensor
    first: Tensor
    columns: Tensor
    compute: Callable[[], object]
    run: Callable[[], object]


class LoopPlan(Protocol):
    """A network on static memory, for CUDA graphs: `run` allocates nothing and reads nothing back.

    Attributes:
        batch: number of images.   launches: kernels that `run` launches, approximately.
        kernels: provide the sampler update that runs on the output.
        input: network input, which the update writes, (batch, C', H, W), C' >= C.
        output: f, (batch, C, H, W), contiguous or channels-last.
        level: (batch,), condition of each image, in the dtype that the network reads.
        conditional: whether the network reads `level`.
        labels: (batch,) int64, the class of each image; None for networks without classes.
        default_label: of images without one; None for networks without classes.
        vectors: numbers that `run` computes of the level alone; None if they depend on more.
        weight_bytes, map_bytes: memory of weights and feature maps.
    """

    batch: int
    device: torch.device
    kernels: Kernels
    input: Tensor
    output: Tensor
    level: Tensor
    labels: Tensor | None
    default_label: int | None
    vectors: Vectors | None

    @property
    def conditional(self) -> bool: ...

    @property
    def launches(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def map_bytes(self) -> int: ...

    def load(self, x: Tensor, scale: float, shift: float) -> None:
        """Sets input = scale * x + shift."""

    def run(self) -> None:
        """Computes `output` from `input` and `level`."""


class Loop:
    """Chains of a micro-batch on the static memory of a plan.

    Args:
        scale, shift: from the network's input to the plan's, which is scale * u + shift.
        graph: scope of a captured graph: a "step", the rows of a "level", the whole "loop", or
            "none".
    """

    def __init__(self, plan: LoopPlan, scale: float, shift: float, graph: str) -> None:
        self.plan, self.scale, self.shift, self.graph = plan, scale, shift, graph
        n, device = plan.batch, plan.device
        self.x = torch.zeros(plan.output.shape, device=device)
        self.nonfinite = torch.zeros(n, dtype=torch.int32, device=device)
        self.seeds, self.samples = torch.zeros(2, n, dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        # Rows of what depends on the level alone, one for each level of the program.
        self.tabulated: Tensor | None = None  # the levels
        self.table: Tensor | None = None
        width = 0 if plan.vectors is None else len(plan.vectors.first)
        self._row = torch.zeros(1, width, dtype=torch.float32, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        # Optional buffers, allocated by the first program that needs them.
        self.h: Tensor | None = None
        self.noise_weights: Tensor | None = None
        self.mask: Tensor | None = None
        self.known: Tensor | None = None
        self.holder: object = None  # token of the run whose chains are loaded
        self.next_row = 0
        self._reserve(_MIN_ROWS)

    def load(
        self, holder: object, program: Program, chains: Chains, levels: Tensor | None, first: int
    ) -> None:
        """Loads a program (in terms of the raw output f) and its chains before row `first`."""
        if program.nfe > self.capacity:
            self._reserve(program.nfe)
        rows = _rows(program, self.scale, self.shift)
        for ours, theirs in zip(self.rows[:2], rows[:2], strict=True):
            ours[: program.nfe].copy_(theirs)
        if levels is not None:
            vectors = self.plan.vectors
            numbers = levels if vectors is None else self._tabulate(vectors, levels)
            self.row_levels[: program.nfe].copy_(numbers)
        self.seeds.fill_(chains.seed)
        self.samples.copy_(chains.samples)
        self.set_labels(chains.labels)
        self.nonfinite.zero_()
        self.x.copy_(chains.x)
        self.h = _copied(self.h, chains.h)
        self.noise_weights = _copied(self.noise_weights, chains.noise_weights)
        self.mask, self.known = _copied(self.mask, chains.mask), _copied(self.known, chains.known)
        # A captured graph is specific to the update variant that these tensors select.
        self.variant = tuple(t is not None for t in (chains.h, chains.noise_weights, chains.mask))
        if first < program.nfe:
            scale, shift = float(program.scale[first]), float(program.shift[first])
            self.plan.load(self.x, scale * self.scale, shift * self.scale + self.shift)
        self.holder = holder
        self._go_to(first)

    def set_labels(self, labels: Tensor | None) -> None:
        """Sets the classes of the images; None is the default."""
        if self.plan.labels is None:
            return
        if labels is None:
            self.plan.labels.fill_(self.plan.default_label or 0)
        else:
            self.plan.labels.copy_(labels)

    def run(self, stop: int) -> None:
        """Runs the rows up to `stop`, without waiting for them."""
        most = {"level": MAX_UNROLLED, "loop": stop}.get(self.graph, 1)
        while self.next_row < stop:
            n = min(stop - self.next_row, most)
            self.graphs.repeat(self.variant, n, self.step, self._warm_up)
            self.next_row += n

    def forward(self) -> None:
        """Runs the plan alone: for guidance, procedures and checks."""
        self.graphs.repeat("network", 1, self.plan.run, self.plan.run)

    def store(self, chains: Chains) -> None:
        """Copies the state back to the chains that were loaded."""
        chains.x.copy_(self.x)
        if chains.h is not None and self.h is not None:
            chains.h.copy_(self.h)
        if chains.nonfinite is None:
            chains.nonfinite = torch.empty_like(self.nonfinite)
        chains.nonfinite.copy_(self.nonfinite)

    def step(self) -> None:
        """Runs the row that the counter selects, always with the same launches."""
        plan = self.plan
        if plan.vectors is not None and self.table is not None:
            torch.index_select(self.row_levels, 0, self.counter, out=self._place)
            torch.index_select(self.table, 0, self._place, out=self._row)
            numbers, vectors = self._row.view(-1), plan.vectors
            torch.index_select(numbers, 0, vectors.columns, out=vectors.memory)
            vectors.run()
        else:
            if plan.conditional:
                levels = self.row_levels[:, None].expand(-1, plan.batch)
                torch.index_select(levels, 0, self.counter, out=plan.level.view(1, -1))
            plan.run()
        history, weighted, masked = self.variant
        plan.kernels.sampler_update_(
            self.x,
            plan.output,
            self.h if history else None,
            self.rows,
            seeds=self.seeds,
            samples=self.samples,
            noise_weights=self.noise_weights if weighted else None,
            mask=self.mask if masked else None,
            known=self.known if masked else None,
            net_input=plan.input,
            nonfinite=self.nonfinite,
        )
        plan.kernels.advance(self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of the loop's own buffers, without the plan's."""
        tensors = (
            self.x, self.h, self.noise_weights, self.mask, self.known, self.row_levels, self.table,
            *self.rows,
        )  # fmt: skip
        return sum(t.nbytes for t in tensors if t is not None)

    def _reserve(self, nfe: int) -> None:
        """Allocates tables for programs of `nfe` rows; drops graphs that read the old ones."""
        self.capacity = 1 << max(nfe - 1, 0).bit_length()
        shape, device = (self.capacity, ROW_WIDTH), self.plan.device
        self.rows = Rows(
            torch.zeros(shape, device=device),
            torch.zeros(self.capacity, 2, dtype=torch.int64, device=device),
            self.counter,
        )
        # The level of each row, or its place in `table`. One extra element, read when the counter
        # is past the end.
        kind = self.plan.level.dtype if self.plan.vectors is None else torch.int64
        self.row_levels = torch.zeros(self.capacity + 1, dtype=kind, device=device)
        self.graphs = Graphs(device, captures=self.graph != "none")

    def _tabulate(self, vectors: Vectors, levels: Tensor) -> Tensor:
        """Computes a row of `table` for each level; returns those of the given ones."""
        distinct, places = levels.unique(return_inverse=True)
        if self.table is None or len(self.table) < len(distinct):
            rows = 1 << max(len(distinct) - 1, 0).bit_length()
            self.table = self._row.new_zeros(rows, self._row.shape[1])
            self.tabulated = None
            self.graphs = Graphs(self.plan.device, captures=self.graph != "none")
        if self.tabulated is None or not torch.equal(self.tabulated, distinct):
            for level, row in zip(distinct, self.table, strict=False):
                self.plan.level.copy_(level)
                self.graphs.repeat("vectors", 1, vectors.compute, vectors.compute)
                torch.index_select(vectors.memory, 0, vectors.first, out=row)
            self.tabulated = distinct
        return places

    def _go_to(self, row: int) -> None:
        self.counter.fill_(row)
        self.next_row = row

    def _warm_up(self) -> None:
        """Runs a step past the end of the table, where an update changes nothing."""
        row = self.next_row
        self.counter.fill_(self.capacity)
        self.step()
        self._go_to(row)


def _rows(program: Program, scale: float, shift: float) -> Rows:
    numbers, steps = program.numbers()
    numbers[:, -2:] = numbers[:, -2:] * scale + [0, shift]
    return new_rows(torch.from_numpy(numbers), torch.from_numpy(steps), "cpu")


def _copied(buffer: Tensor | None, value: Tensor | None) -> Tensor | None:
    """Copies a value to its static buffer, allocated at first use."""
    if value is None:
        return buffer
    if buffer is None:
        kind = torch.bool if value.dtype is torch.bool else torch.float32
        buffer = torch.empty(value.shape, dtype=kind, device=value.device)
    return buffer.copy_(value)
