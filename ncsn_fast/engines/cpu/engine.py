"""engine="cpu": packed convolutions with our fused C++ kernels between them."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ncsn_fast.engines.base import DTYPES
from ncsn_fast.engines.cpu import autotune, choice, onednn
from ncsn_fast.engines.cpu.choice import Layers
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.memory_plan import OpCost, format_profile
from ncsn_fast.engines.lowering.static_memory import Weights
from ncsn_fast.engines.static_engine import StaticEngine
from ncsn_fast.models.classes import default_label
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops.addresses import NHWC, array
from ncsn_fast.ops.extension import forced_isa
from ncsn_fast.samplers.program import Chains, FusedUpdate, Program, Update

_PROFILE_ROUNDS = 5


class CpuEngine(StaticEngine):
    """A network as a plan of steps on preallocated memory, executed by the C++ extension.

    Channels-last. Weights are packed when the engine is built. Convolutions run in oneDNN, in our
    Winograd kernel or in our kernel for the tiles of AMX, with one fused pass of ours between two
    of them, or none. Sampling calls the extension
    once per noise level; inside, nothing is allocated and no Python runs, but for operations that
    no kernel of ours covers: PyTorch runs these, and `describe` names them. The weights are checked
    against the reference once.

    Args:
        convolutions: "direct" (oneDNN) or "winograd" (ours) for 3x3 convolutions, "amx" (ours) for
            those that keep their size, or what `choices` said of another engine; None for the
            environment variable NCSN_FAST_CONVOLUTIONS, else the fastest one on this machine for
            every layer; 1x1 convolutions and attention may then be matrix products, too. Winograd
            stores four times the weights.

    Raises:
        UnsupportedNetwork: torch cannot export the network (see `refuses`).
        EngineError: the output differs from the reference by more than precision.BOUNDS.
    """

    name = "cpu"
    summary = "packed channels-last convolutions, our C++ kernels between them"
    dtypes = ("bf16", "fp32")
    options: ClassVar[dict[str, tuple[str, ...]]] = {"convolutions": autotune.ALGORITHMS}

    def __init__(
        self, model: ScoreModel, *, convolutions: str | None = None, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        self._weights: Weights = {}  # shared by all plans
        self.release()
        given = convolutions or os.environ.get("NCSN_FAST_CONVOLUTIONS")
        layers = Layers.of(self.lowered(model.config.image_size))
        self._choice = choice.choose(given, layers, self.dtype, self.threads)
        named = given in autotune.ALGORITHMS
        self.convolutions = given if given and named else choice.code(self._choice, layers)
        self.error = self.check_precision()
        self.forget_weights()  # packed copies remain; the caller may free theirs

    def prepare(self) -> None:
        with self.context(), self._lock:
            self._plan(self.model.config.image_size)

    def check_facts(self) -> dict[str, Any]:
        own = {"convolutions": self.convolutions, "isa": forced_isa.get()}
        return {**super().check_facts(), **own}

    @classmethod
    def unavailable(cls) -> str | None:
        return onednn.problem()

    @property
    def choices(self) -> dict[str, str]:
        return {"convolutions": self.convolutions}

    @property
    def variant(self) -> str:
        return f"{self.dtype} ({self.convolutions})"

    @classmethod
    def default_dtype(cls, device: torch.device) -> str:
        return autotune.fastest().dtype

    @classmethod
    def attempts(
        cls,
        device: torch.device,
        dtype: str | None,
        options: Mapping[str, Any],
        threads: int | None = None,
    ) -> list[dict[str, Any]]:
        """Tries direct convolutions before a more precise dtype: Winograd is less precise."""
        given = options.get("convolutions") or os.environ.get("NCSN_FAST_CONVOLUTIONS")
        if dtype is None and given == "amx":
            dtype = "bf16"
        first = autotune.fastest(threads).dtype if dtype is None else dtype
        dtypes = [{**options, "dtype": name} for name in cls._dtypes_to_try(dtype, first)]
        if given:
            return dtypes
        return [
            {**attempt, **algorithm}
            for attempt in dtypes
            for algorithm in ({}, {"convolutions": "direct"})
        ]

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        others = {k: v for k, v in given.items() if k != "convolutions" or not choice.is_code(v)}
        super().check_options(others)

    @classmethod
    def slowdown(
        cls, wanted: Mapping[str, Any], taken: Mapping[str, Any], threads: int | None = None
    ) -> float | None:
        measured = autotune.fastest(threads)

        def speed(variant: Mapping[str, Any]) -> float | None:
            dtype = variant["dtype"]
            name = variant.get("convolutions")
            algorithms = [name] if name in autotune.ALGORITHMS else [*autotune.ALGORITHMS]
            found = [measured.speed.get(f"{dtype} {algorithm}") for algorithm in algorithms]
            return max((speed for speed in found if speed is not None), default=None)

        before, after = speed(wanted), speed(taken)
        return before / after if before is not None and after is not None else None

    def memory(self) -> int:
        plan = self._plan(self.model.config.image_size)
        return plan.weight_bytes + plan.map_bytes

    def network(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        self.check_call(x, level, labels)
        with self._lock:
            plan = self._load(x)
            plan.set_conditions(*self._conditions(level, labels))
            plan.run()
            return plan.output.clone()

    def _stepper(
        self, program: Program, chains: Chains, levels: Tensor | None, update: Update | None
    ) -> Callable[[int, int], object]:
        if update is not None:  # noise that the caller supplies
            return super()._stepper(program, chains, levels, update)
        graph = self.lowered((chains.x.shape[2], chains.x.shape[3]))
        rows = _Rows(program, levels, graph.scale, graph.shift)
        if program.has_history and chains.h is None:
            chains.h = torch.zeros_like(chains.x)

        def run_rows(first: int, stop: int) -> None:
            if first == 0:
                FusedUpdate().begin(chains, program)
            if first >= stop:
                return
            with self._lock:
                scale, shift = float(program.scale[first]), float(program.shift[first])
                plan = self._load(chains.x, scale, shift)
                for start, end, level in rows.of_one_level(first, stop):
                    each = None if level is None else rows.each(level, self.batch_size)
                    plan.set_conditions(*self._conditions(each, chains.labels))
                    self._sample(plan, chains, rows, start, end)

        return run_rows

    def _conditions(self, level: Tensor | None, labels: Tensor | None) -> list[Tensor]:
        """Returns the network's further inputs, (batch_size,) each."""
        found = [] if level is None or self.model.conditioning == "none" else [level]
        if (label := default_label(self.model.config)) is not None:
            none = torch.full((self.batch_size,), label)
            found.append(none if labels is None else labels)
        return found

    def describe(self) -> str:
        """Describes the plan, one line per operation: shape, milliseconds, GFLOP/s or GB/s, share.

        FLOP are those of the direct algorithm, whichever ran.
        """
        plan = self._plan(self.model.config.image_size)
        costs, seconds = map(list, zip(*self.profile(), strict=True))
        return (
            f"{format_profile(costs, seconds, self.dtype)}; "
            f"weights {plan.weight_bytes / 1e6:.1f} MB, maps {plan.map_bytes / 1e6:.1f} MB"
        )

    def profile(self, rounds: int = _PROFILE_ROUNDS) -> list[tuple[OpCost, float]]:
        """Times the operations of the plan for the model's image size.

        Returns:
            Each operation, and the median of its seconds in so many runs.
        """
        plan = self._plan(self.model.config.image_size)
        with self.context(), self._lock:
            plan.run()
            each = zip(*(plan.profile() for _ in range(rounds)), strict=True)
            return [*zip(plan.costs, map(statistics.median, each), strict=True)]

    def release(self) -> None:
        super().release()
        self._plans: dict[tuple[int, int], CpuPlan] = {}

    def _plan(self, size: tuple[int, int]) -> CpuPlan:
        if size not in self._plans:
            self._plans[size] = CpuPlan(
                self.lowered(size),
                self.batch_size,
                DTYPES[self.dtype],
                self._weights,
                winograd=self._choice.second,
                products=self._choice.second,
                tiles=self._choice.tiles,
            )
        return self._plans[size]

    def _load(self, x: Tensor, scale: float = 1.0, shift: float = 0.0) -> CpuPlan:
        """Returns the plan for images of the size of x, with x loaded."""
        plan = self._plan((x.shape[2], x.shape[3]))
        plan.load(x, scale, shift)
        return plan

    def _sample(self, plan: CpuPlan, chains: Chains, rows: _Rows, start: int, end: int) -> None:
        n, c, height, width = shape = tuple(chains.x.shape)
        count, kind = end - start, DTYPES[self.dtype]
        plan.steps.sample(
            array("x", chains.x, shape, torch.float32),
            array("f", plan.output, shape, kind, layout=NHWC),
            array("h", chains.h, shape, torch.float32),
            (n, height, width, c), self.dtype == "bf16", chains.seed,
            array("samples", chains.samples, (n,), torch.int64),
            array("noise_weights", chains.noise_weights, (n, 2), torch.float32),
            array("mask", chains.mask, shape, torch.bool),
            array("known", chains.known, shape, torch.float32),
            array("net_input", plan.input, shape, kind, layout=NHWC),
            array("coefficients", rows.coefficients[start:end], (count, 11), torch.float64),
            array("steps", rows.steps[start:end], (count, 2), torch.int64), count, forced_isa.get(),
        )  # fmt: skip


class _Rows:
    """A program's rows in the memory layout of the extension.

    scale, shift: from the network's input to the plan's.
    """

    def __init__(self, program: Program, levels: Tensor | None, scale: float, shift: float) -> None:
        numbers, steps = program.numbers()
        numbers[:, -2:] = numbers[:, -2:] * scale + [0, shift]
        self.coefficients = torch.from_numpy(numbers).contiguous()
        self.steps = torch.from_numpy(steps).contiguous()
        self.levels = None if levels is None else levels.tolist()
        self._dtype = None if levels is None else levels.dtype

    def each(self, level: float, batch: int) -> Tensor:
        """Returns the condition of a row for every image, (batch,)."""
        return torch.full((batch,), level, dtype=self._dtype)

    def of_one_level(self, first: int, stop: int) -> list[tuple[int, int, float | None]]:
        """Returns (start, end, trained level) of each run of rows with the same level."""
        if self.levels is None:
            return [(first, stop, None)]
        changes = [k for k in range(first + 1, stop) if self.levels[k] != self.levels[k - 1]]
        bounds = [first, *changes, stop]
        return [(i, j, self.levels[i]) for i, j in itertools.pairwise(bounds)]
