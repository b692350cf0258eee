"""Engine: a fast network call for one model, and the sampling loop around it."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ncsn_fast.diffusion.parameterisation import Parameterisation, standard
from ncsn_fast.engines.batch_sizes import balanced_batch_size, largest_batch_size
from ncsn_fast.engines.torch_settings import torch_threads
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.names import suggestion
from ncsn_fast.samplers.procedure import (
    Constrain,
    Guide,
    OnStep,
    Procedure,
    Result,
    Score,
)
from ncsn_fast.samplers.program import Chains, Program, Update, run

# Whether long builds show a progress bar.
progress_shown: contextvars.ContextVar[bool] = contextvars.ContextVar("progress", default=True)

# Arguments of Sampler, for misspelt ones, which arrive as options of the engine.
_SETTINGS = ("device", "dtype", "batch_size", "compile_cache", "threads")
SCALED_SCORE = standard("scaled_score", sees="nothing")
# Compute dtypes. tf32: feature maps are float32, convolutions round their inputs to TF32.
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def dtype_name(dtype: str | torch.dtype, kind: type[Engine]) -> str:
    """Returns our name of a dtype ("fp32", torch.float32, "float32", ...) for an engine class.

    Raises:
        ValueError: the engine does not support the dtype; the message lists those it does.
    """
    aliases = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    name = aliases.get(given := str(dtype).removeprefix("torch."), given)
    if name not in kind.dtypes:
        raise ValueError(
            f"engine {kind.name!r} computes in {' or '.join(kind.dtypes)}; got dtype {dtype!r}"
        )
    return name


class EngineUnavailable(RuntimeError):
    """Error of a named engine that cannot run here; says what is missing and what would run."""


class EngineError(RuntimeError):
    """Error of an engine that cannot be built as requested or does not match the reference."""


class DamagedModelError(EngineError):
    """Error of a model that no engine can run: its own output is not finite."""


class PrecisionError(EngineError):
    """Error of an engine whose dtype or arithmetic is not precise enough for the model.

    Attributes:
        reason: the message without its remedy.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason


class Engine(abc.ABC):
    """A model prepared to run on micro-batches of a fixed size.

    Args:
        model: the ScoreModel. Engines run a copy made at construction: neither the model nor its
            training mode is changed, and later changes to it have no effect.
        dtype: compute dtype of the network.   batch_size: images per micro-batch.
        threads: CPU threads; None for torch's setting.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("fp32",)  # from fastest to most precise
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)
    caches: ClassVar[bool] = False  # stores built engines in the folder compile_cache
    options: ClassVar[dict[str, tuple[str, ...]]] = {}  # engine-specific options and their values

    def __init__(
        self,
        model: ScoreModel,
        *,
        device: torch.device,
        dtype: str,
        batch_size: int,
        threads: int | None = None,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.batch_size, self.threads = batch_size, threads
        self._doubled: Self | None = None

    def resized(self, batch_size: int) -> Self:
        """Returns this engine for another micro-batch size, sharing its weights."""
        other = copy.copy(self)
        other.batch_size, other._doubled = batch_size, None
        return other

    @classmethod
    @abc.abstractmethod
    def unavailable(cls) -> str | None:
        """Returns None if the engine runs here, else what is missing and how to get it."""

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        """Returns None if the engine runs this model, else the part it does not support."""
        return None

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        """Raises ValueError unless the engine has these options and allows these values."""
        known = "; ".join(f"{k}: {', '.join(v)}" for k, v in cls.options.items()) or "none"
        for name, value in given.items():
            if value not in cls.options.get(name, ()):
                near = "" if name in cls.options else suggestion(name, (*cls.options, *_SETTINGS))
                raise ValueError(
                    f"engine {cls.name!r} has no option {name}={value!r}{near}; its options: "
                    f"{known}"
                )

    @classmethod
    def default_dtype(cls, device: torch.device) -> str:
        """Returns the default dtype of the engine on a device of this machine."""
        return cls.dtypes[0]

    @property
    def choices(self) -> dict[str, str]:
        """Options that change the samples' bits and that the engine may choose by itself."""
        return {}

    @property
    def variant(self) -> str:
        """Names the dtype, and the algorithm where the engine chose one, for messages."""
        return self.dtype

    @classmethod
    def attempts(
        cls,
        device: torch.device,
        dtype: str | None,
        options: Mapping[str, Any],
        threads: int | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the settings to build the engine with, in the order to try them: fastest first.

        All attempts have the given dtype and options; dtype None and options left out may vary.
        """
        first = cls.default_dtype(device) if dtype is None else dtype
        return [{**options, "dtype": name} for name in cls._dtypes_to_try(dtype, first)]

    @classmethod
    def _dtypes_to_try(cls, dtype: str | None, first: str) -> list[str]:
        """Returns the given dtype; for None, `first` and the more precise ones."""
        if dtype is not None:
            return [dtype]
        return [*cls.dtypes[cls.dtypes.index(first) :]]

    @classmethod
    def slowdown(
        cls, wanted: Mapping[str, Any], taken: Mapping[str, Any], threads: int | None = None
    ) -> float | None:
        """Returns how many times longer one of `attempts` takes than another; None if unknown."""
        return None

    @classmethod
    def type_of_file(cls, options: Mapping[str, Any]) -> str | None:
        """Returns the dtype stored in the plan file that the options name, if any."""
        return None

    def fitting(self, batch_size: int) -> int:
        """Returns the supported micro-batch size nearest to this one."""
        return batch_size

    @classmethod
    def default_batch_size(
        cls, n: int, shape: tuple[int, int, int], device: torch.device, options: Mapping[str, Any]
    ) -> int:
        """Returns the micro-batch size of a call for n images (C, H, W) where none is named.

        Micro-batches are balanced, so that fewer images than micro-batches are padding. Engines
        that prepare every size at a cost override this.
        """
        return balanced_batch_size(n, largest_batch_size(shape, device))

    def release(self) -> None:
        """Frees the memory of micro-batches; weights stay, and the engine remains usable."""
        return None

    def memory(self) -> int | None:
        """Returns the bytes that a running micro-batch needs beside the model; None if unknown."""
        return None

    def describe(self) -> str:
        """Describes the engine: one line per operation, or a single line for most engines."""
        return f"engine {self.name}, {self.dtype}, on {self.device}: {self.summary}"

    def check_images(self, x: Tensor) -> None:
        """Raises ValueError unless x is a micro-batch that the network accepts."""
        self.model.check_input(x)
        if len(x) != self.batch_size:
            raise ValueError(f"this engine runs batches of {self.batch_size}; got {len(x)} images")

    def check_call(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> None:
        """Raises ValueError unless `network` accepts these arguments."""
        self.check_images(x)
        seen = self.model.conditioning
        if seen != "none" and level is None:
            what = "noise level" if seen == "level" else seen
            raise ValueError(f"this network is conditioned on the {what}: pass {seen} (N,)")
        if level is not None and level.shape != (len(x),):
            raise ValueError(f"{seen} must have shape ({len(x)},); got {tuple(level.shape)}")
        if labels is not None and (labels.shape != (len(x),) or labels.dtype != torch.int64):
            raise ValueError(
                f"labels must be int64 ({len(x)},); got {labels.dtype} {tuple(labels.shape)}"
            )

    def check_chains(self, chains: Chains) -> None:
        """TypeError or ValueError unless chains are a micro-batch of this engine's."""
        chains.check(self.device)
        self.check_images(chains.x)

    def check_run(self, program: Program, chains: Chains, update: Update | None) -> None:
        """TypeError or ValueError unless the engine runs this program on these chains."""
        self.check_chains(chains)
        if chains.mask is not None and program.reference_noise is None:
            raise ValueError(
                f"program {program.name!r} imposes no known pixels: make it with "
                "samplers.program_transforms.inpainting, or give chains no mask"
            )
        if program.imposes and chains.mask is None and update is None:
            raise ValueError(
                f"program {program.name!r} imposes known pixels: give chains mask and known, of "
                f"shape {tuple(chains.x.shape)}"
            )

    @property
    def parameterisation(self) -> Parameterisation:
        """Of what `network` computes: the model's, unless the engine's graph has it inside."""
        return SCALED_SCORE if self.gives_scaled_score else self.model.parameterisation

    @property
    def gives_scaled_score(self) -> bool:
        """Whether `network` computes sigma * score of noisy images instead of the raw output."""
        return False

    def condition(self, sigma: Tensor) -> Tensor | None:
        """Returns the second input of `network` at noise levels sigma, as ScoreModel.condition.

        Engines whose graphs take sigma itself return that.
        """
        return self.model.condition(sigma)

    @abc.abstractmethod
    def network(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """Returns the raw network output F for the network's input x (batch_size, C, H, W) float32.

        level is the result of `condition`, (batch_size,): int64 levels, float32 numbers, or None
        for unconditioned networks. labels (batch_size,) int64 are for networks with
        classes; None for no class. Engines that `refuses` such networks do not take them.
        """

    def network_of(self, chains: Chains) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Returns the network for chains with labels and guidance; (x, level) -> F."""
        labels, w = chains.labels, chains.guidance
        if labels is None:
            return self.network
        if w is None:
            return lambda x, level: self.network(x, level, labels)
        n, none = len(labels), torch.full_like(labels, self.model.n_classes)
        if self.fitting(2 * n) != 2 * n:  # an engine of fixed sizes runs the halves in turn

            def in_turn(x: Tensor, level: Tensor | None) -> Tensor:
                without = self.network(x, level, none).float()
                return torch.lerp(without, self.network(x, level, labels).float(), w)

            return in_turn
        pair, both = self._pair(2 * n), torch.cat([labels, none])

        def at_once(x: Tensor, level: Tensor | None) -> Tensor:
            twice = None if level is None else level.repeat(2)
            f = pair.network(x.repeat(2, 1, 1, 1), twice, both).float()
            return torch.lerp(f[n:], f[:n], w)

        return at_once

    def _pair(self, size: int) -> Self:
        """Returns the engine for both halves of classifier-free guidance in one batch."""
        if self._doubled is None or self._doubled.batch_size != size:
            self._doubled = self.resized(size)
        return self._doubled

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Sets the state in which this engine computes, whatever the caller's settings."""
        autocast = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(), autocast, torch_threads(self.threads):
            yield

    def run(
        self,
        program: Program,
        chains: Chains,
        *,
        start: int = 0,
        update: Update | None = None,
        guide: Guide | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Runs a program (in terms of sigma * score) on a micro-batch; returns the final state.

        on_level is called after each of `chunks`, outside `context`, with the number of rows done.
        With a guide, the network and the guide are called for every row.

        Raises:
            TypeError, ValueError: the chains are not as `Chains` says or not a micro-batch of this
                engine; the program imposes known pixels and the chains have none, or the reverse;
                start is outside the program. Raised before anything is computed.
        """
        _check_rows(program, start, program.nfe)
        if guide is None:
            run_rows = self._own_steps(program, chains, update)
        else:
            self.check_run(program, chains, update)
            run_rows = _guided_steps(program, chains, update, self.guided(guide, chains))
        left = [rows for rows in self.chunks(program) if rows.stop > start]
        for rows in left or [range(start, start)]:  # without rows known pixels are still imposed
            with self.context():
                run_rows(max(start, rows.start), rows.stop)
            if on_level is not None and rows:
                on_level(rows.stop)
        return chains.x

    def _own_steps(
        self, program: Program, chains: Chains, update: Update | None
    ) -> Callable[[int, int], object]:
        """Returns a function that runs rows, with the model's parameterisation in the table."""
        sigma = torch.from_numpy(program.sigma)
        own = program.of_network(self.parameterisation.linear_form(sigma).numpy())
        conditions = self.condition(sigma.to(self.model.device))
        if conditions is not None:
            conditions = conditions.to(self.device)
        return self.stepper(own, chains, conditions, update)

    def solve(
        self,
        procedure: Procedure,
        chains: Chains,
        *,
        guide: Guide | None = None,
        constrain: Constrain | None = None,
        on_step: OnStep | None = None,
    ) -> Result:
        """Runs a procedure (a sampler that is not a table); on_step is called inside `context`."""
        self.check_chains(chains)
        with self.context():
            return procedure.solve(self.guided(guide, chains), chains, constrain, on_step)

    def guided(self, guide: Guide | None, chains: Chains) -> Score:
        """Returns the score of this engine's network for some chains, modified by the guide."""
        network = self.network_of(chains)

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            return self._score_by(network, x, sigma)

        return score if guide is None else functools.partial(guide.score, score)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Returns grad log p_sigma(x), shape of x (batch_size, C, H, W), on the engine's device.

        sigma is (batch_size,). Call it inside `context`.
        """
        return self._score_by(self.network, x, sigma)

    def _score_by(
        self, network: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, sigma: Tensor
    ) -> Tensor:
        seen = self.condition(sigma)

        def conditioned(u: Tensor, _: Tensor | None) -> Tensor:
            return network(u, None if seen is None else seen.to(self.device))

        return self.model.score_by(conditioned, x, sigma, self.parameterisation)

    def chunks(self, program: Program) -> list[range]:
        """Splits the rows of a program at its callbacks: one range per noise level."""
        return list(program.level_rows())

    def stepper(
        self, program: Program, chains: Chains, levels: Tensor | None, update: Update | None
    ) -> Callable[[int, int], object]:
        """Returns a function that runs rows first .. stop-1 of a program on the chains, in place.

        The program is in terms of the raw output f; levels (K,) are the rows' conditions, as
        returned by `condition`. Raises as `run` does; the function that it returns refuses
        rows outside the program.
        """
        self.check_run(program, chains, update)
        if levels is None and self.model.conditioning != "none":
            raise ValueError(f"levels must have shape ({program.nfe},) for this network; got None")
        if levels is not None and levels.shape != (program.nfe,):
            raise ValueError(f"levels must have shape ({program.nfe},); got {tuple(levels.shape)}")
        stepper = Engine._stepper if chains.guidance is not None else type(self)._stepper
        run_rows = stepper(self, program, chains, levels, update)

        def run_checked_rows(first: int, stop: int) -> object:
            _check_rows(program, first, stop)
            return run_rows(first, stop)

        return run_checked_rows

    def _stepper(
        self, program: Program, chains: Chains, levels: Tensor | None, update: Update | None
    ) -> Callable[[int, int], object]:
        """Returns a function (first, stop) that runs rows in place; `stepper` has checked them.

        Engines with a loop of their own override it.
        """

        conditioned = self.network_of(chains)

        def network(x: Tensor, k: int) -> Tensor:
            return conditioned(x, None if levels is None else levels[k].expand(len(x)))

        return lambda first, stop: run(
            program, network, chains, start=first, stop=stop, update=update
        )

    def output(self, x: Tensor, level: Tensor | None) -> Tensor:
        """Returns f for any number of images, in padded micro-batches; float32 on the CPU."""
        parts = []
        with self.context():
            for i in range(0, len(x), self.batch_size):
                rows = torch.arange(i, i + self.batch_size).clamp(max=len(x) - 1)
                f = self.network(
                    x[rows].to(self.device), None if level is None else level[rows].to(self.device)
                )
                parts.append(f.float().cpu()[: len(x) - i])
        return torch.cat(parts) if parts else torch.empty_like(x)


def _check_rows(program: Program, first: int, stop: int) -> None:
    if not 0 <= first <= stop <= program.nfe:
        raise ValueError(
            f"rows must lie in 0 .. {program.nfe}, those of program {program.name!r}; got "
            f"{first} .. {stop}"
        )


def _guided_steps(
    program: Program, chains: Chains, update: Update | None, score: Score
) -> Callable[[int, int], object]:
    """Returns a function that runs rows of a program, calling the score at each one."""

    def network(x: Tensor, k: int) -> Tensor:
        sigma = float(program.sigma[k])
        return sigma * score(x, torch.full((len(x),), sigma, device=x.device))

    return lambda first, stop: run(program, network, chains, start=first, stop=stop, update=update)
