"""Command-line options that several commands share."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import tyro

from ncsn_fast.inference.sampling_params import SamplingParams
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.published_samplers import (
    PUBLISHED_SAMPLERS,
    check_network,
    published_sources,
    resolve,
)

if TYPE_CHECKING:  # torch is imported when the options are parsed, and the work begins
    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.sampler import Sampler

MOST_CLASSES = 2**20
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options of the model and the engine that runs it."""

    model: str | None = None
    """Run folder, model folder, published .pth or .pkl, folder of diffusers, OWNER/NAME of one on
    the Hugging Face Hub, or the name of a model that ships, such as `digits`. Default: the newest
    run below ./runs, else the digits."""
    engine: Literal["auto", "eager", "compile", "cpu", "cuda", "ort", "trt"] = "auto"
    """Engine; `python -m ncsn_fast.doctor` lists those that run on this machine."""
    dtype: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """Type the network computes in. Default: the engine's choice."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the device of the engine."""
    batch_size: int | None = None
    """Images in a micro-batch."""
    threads: int | None = None
    """CPU threads."""
    compile_cache: Path | None = None
    """Folder for compiled engines (trt). Default: a folder below ~/.cache."""
    engine_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """The engine's own options, as NAME VALUE pairs: graph step, batch 1:64:256."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name, most in (("batch_size", 2**32), ("threads", 2**16)):
            if (value := getattr(self, name)) is not None:
                check_count(f"--{name.replace('_', '-')}", value, most=most)

    def sampler(self) -> Sampler:
        """Makes the Sampler that these options describe."""
        from ncsn_fast.sampler import Sampler

        return Sampler(self.model, **self.sampler_options())

    def sampler_options(self) -> dict[str, Any]:
        """Returns the keyword arguments of Sampler."""
        return {
            "engine": self.engine,
            "dtype": self.dtype,
            "device": self.device,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "compile_cache": self.compile_cache,
            **self.engine_options,
        }


def own_options_first(options: type[T]) -> type[T]:
    """Decorates a dataclass: --help lists its own options first, then those of its bases."""
    fields = options.__dict__["__dataclass_fields__"]
    names = [name for base in options.__mro__ for name in inspect.get_annotations(base)]
    options.__dataclass_fields__ = {name: fields[name] for name in names if name in fields}  # type: ignore[attr-defined]
    return options


def method_argument(option: str, also: str = "") -> Any:
    """Returns the help of a method's option, with the methods that have it and their defaults.

    Args:
        also: a default of the command itself, in words, to be named first.
    """
    return tyro.conf.arg(
        help=methods.OPTIONS[option].help,
        help_behavior_hint=f"(default: {also}{methods.defaults(option)})",
    )


def with_method_options(options: type[T]) -> type[T]:
    """Decorates a dataclass: adds a field for the method, its steps and every option of a method.

    The fields follow from METHODS and OPTIONS (samplers/methods.py). Their default is None, for the
    method's own default, except for switches: their default is that of the methods if all agree.
    """
    names = cast(Any, Literal)[tuple(methods.METHODS)]
    sources = "; ".join(f"{name}: {row.source}" for name, row in methods.METHODS.items())
    steps = tyro.conf.arg(help_behavior_hint=f"(default: {methods.default_steps()})")
    types: dict[str, Any] = {
        "method": Annotated[names, tyro.conf.arg(help=sources)],
        "steps": Annotated[int | None, steps],
        "published": Annotated[
            cast(Any, Literal)[tuple(PUBLISHED_SAMPLERS)] | None,
            tyro.conf.arg(
                help="Published sampler: its method, steps and options, changed by those that are "
                f"given. {published_sources()}"
            ),
        ],
    }
    for name in _command_line_options():
        default, kind = _switch_default(name), methods.option_type(name)
        types[name] = Annotated[kind | None if default is None else kind, method_argument(name)]
        setattr(options, name, default)
    options.__annotations__ = {**inspect.get_annotations(options), **types}
    return options


def _command_line_options() -> list[str]:
    """Returns the options of methods that the command line has."""
    return [name for name in methods.options() if methods.OPTIONS[name].command_line]


def _switch_default(option: str) -> bool | None:
    """Returns the default of a switch; None for other options, or if methods differ."""
    first, *others = (parameter.default for parameter in methods.methods_with(option).values())
    return first if isinstance(first, bool) and all(d is first for d in others) else None


@dataclasses.dataclass(frozen=True)
@with_method_options
class SamplingOptions(SamplingParams, ModelOptions):
    """Options of sampling; those of the methods are generated from their builders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seed", "start"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"--{name} must be in [0, 2**32); got {getattr(self, name)}")
        if self.draws():
            chosen = self.method_options()
            methods.check_options(chosen["method"], set(chosen) - {"method", "steps"})

    def draws(self) -> bool:
        """Returns whether the command draws samples at all."""
        return True

    def method_options(self) -> dict[str, Any]:
        """Returns method, steps and the given options of the method, as keyword arguments.

        Those of a published sampler are among them.
        """
        given = {name: getattr(self, name) for name in _command_line_options()}
        method = self.method
        if self.published is not None and method == methods.DEFAULT:
            method = PUBLISHED_SAMPLERS[self.published].method
        own = {
            name: value
            for name, value in given.items()
            if value is not None
            and (value is not _switch_default(name) or method in methods.methods_with(name))
        }
        if self.published is None:
            return {"method": method, "steps": self.steps, **own}
        method, steps, own = resolve(self.published, method, self.steps, own)
        return {"method": method, "steps": steps, **own}

    def check_model(self, model: ScoreModel) -> None:
        """Raises ValueError unless a model is one that these options are for."""
        if self.published is not None:
            check_network(self.published, model)

    def sampling(self) -> dict[str, Any]:
        """Returns the keyword arguments for the methods of Sampler that draw."""
        shared = {"seed": self.seed, "start": self.start, "progress": not self.quiet}
        return {**shared, **self.method_options()}


@dataclasses.dataclass(frozen=True)
class ClassOptions(SamplingOptions):
    """Options of sampling with a network that takes classes."""

    labels: str | None = None
    """Classes, of a model that has them: 3, 0,3,7 or 0-9. Sample i takes the i-th of them, over and
    over. Default: no class."""
    guidance: float | None = None
    """Weight of classifier-free guidance towards the --labels; 1 is none, and more sharpens. Each
    step costs twice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None:
            parse_labels(self.labels)
        elif self.guidance is not None:
            raise ValueError("--guidance is towards classes: give --labels")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"--guidance must be finite; got {self.guidance}")

    def class_options(self) -> dict[str, Any]:
        """Returns the given options of classes, for files: the list of labels, and the weight."""
        labels = None if self.labels is None else parse_labels(self.labels)
        given = {"labels": labels, "guidance": self.guidance}
        return {name: value for name, value in given.items() if value is not None}

    def classes(self, samples: Iterable[int]) -> dict[str, Any]:
        """Returns the keyword arguments of classes for samples of these indices."""
        found = self.class_options()
        if "labels" in found:
            known = found["labels"]
            found["labels"] = [known[i % len(known)] for i in samples]
        return found

    def check_model(self, model: ScoreModel) -> None:
        """Raises ValueError unless a model takes the labels, the guidance and the sampler."""
        from ncsn_fast.inference.sampling_params import SamplingCall

        super().check_model(model)
        found = self.class_options()
        SamplingCall(**found).classes(model, len(found.get("labels", ())))


def parse_labels(text: str) -> list[int]:
    """Returns the classes of --labels: numbers and ranges of them, between commas."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not low <= high < MOST_CLASSES:
            raise ValueError(f"--labels must be classes, such as 3, 0,3,7 or 0-9; got {text!r}")
        found += range(low, high + 1)
    return found


def check_png(name: str, path: Path | None) -> None:
    """Raises ValueError if a path is given that does not end in .png."""
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"{name} must end in .png, as pictures are written so; got {str(path)!r}")


def check_gif(name: str, path: Path | None) -> None:
    """Raises ValueError if a path is given that does not end in .gif."""
    if path is not None and path.suffix.lower() != ".gif":
        raise ValueError(f"{name} must end in .gif, as it is written so; got {str(path)!r}")


def check_count(name: str, value: int, least: int = 1, most: int = 2**32) -> None:
    """Raises ValueError unless an option's value is at least `least` and at most `most`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}; got {value}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless an option's value is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")
