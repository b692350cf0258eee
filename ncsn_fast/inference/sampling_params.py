"""Parameters shared by all methods of Sampler that draw samples."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ncsn_fast.samplers import methods
from ncsn_fast.samplers.published_samplers import check_network, resolve

if TYPE_CHECKING:  # the command line has these parameters before torch is imported
    from torch import Tensor

    from ncsn_fast.data.images import Output
    from ncsn_fast.inference.monitor import Callback
    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.samplers.procedure import Procedure
    from ncsn_fast.samplers.program import Program

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Choice of samples and method, for Sampler and the command line alike."""

    seed: int = 0
    """Seed of all noise."""
    start: int = 0
    """Index of the first sample."""
    method: str = methods.DEFAULT
    """Sampling method, a row of METHODS (samplers/methods.py)."""
    steps: int | None = None
    """Noise levels, or steps in time (em); heun takes two evaluations each."""
    published: str | None = None
    """Published sampler, a row of PUBLISHED_SAMPLERS (samplers/published_samplers.py): its method,
    steps and options, unless they are given."""


@dataclasses.dataclass(frozen=True)
class SamplingCall(SamplingParams):
    """Parameters of one call: the samples, the form of the result, and the method's options."""

    method: Any = "ald"
    """Sampling method, a row of METHODS, or a function in the form of k-diffusion."""
    output: Output = "pt"
    """"pt": float32 (n, C, H, W) in [0, 1] on the CPU; "np": uint8 (n, H, W, C); "pil": a list."""
    progress: bool = True
    """Whether to show a progress bar."""
    callback: Callback | None = None
    """Called with a Progress after every noise level."""
    labels: Any = None
    """Classes of a model that has them: an integer for all samples, or one each."""
    guidance: float | None = None
    """Weight w of classifier-free guidance, F(no class) + w (F(class) - F(no class))."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method (samplers/methods.py)."""

    def __post_init__(self) -> None:
        if self.published is None:
            return
        chosen = resolve(self.published, self.method, self.steps, self.options)
        for name, value in zip(("method", "steps", "options"), chosen, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> SamplingCall:
        """Makes a call from keyword arguments; all that are not fields are the method's options."""
        shared = keywords.keys() & {f.name for f in dataclasses.fields(cls)} - {"options"}
        own = {name: value for name, value in keywords.items() if name not in shared}
        return cls(**{name: keywords[name] for name in shared}, options=own)

    def build(self, model: ScoreModel, **more: Any) -> Program | Procedure:
        """Builds the sampler for a model; `more` are options that replace those of the call."""
        if self.published is not None:
            check_network(self.published, model)
        return methods.build(self.method, model, self.steps, {**self.options, **more})

    def classes(self, model: ScoreModel, n: int) -> Tensor | None:
        """Returns the labels (n,) int64 of a call for n samples, or None.

        TypeError or ValueError unless they are classes of the model, and guidance has labels.
        """
        import torch

        from ncsn_fast.models.classes import require_labels, takes_no_class

        if self.guidance is not None:
            if self.labels is None:
                raise ValueError("guidance is towards a class: give labels")
            if not math.isfinite(self.guidance):
                raise ValueError(f"guidance must be finite; got {self.guidance}")
        if self.labels is None:
            require_labels(model.config, None)
            return None
        if model.n_classes == 0:
            raise ValueError(
                "this model has no classes, so labels say nothing to it; `guided` samples with a "
                "classifier"
            )
        if self.guidance is not None and not takes_no_class(model.config):
            raise ValueError(
                f"guidance compares with no class, and this network does not take the label "
                f"{model.n_classes}, which means that: leave guidance out, or give its embedding "
                "one row more and train it on that"
            )
        given = torch.as_tensor(self.labels)
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"labels must be integers; got {given.dtype}")
        if given.ndim > 1 or (given.ndim == 1 and len(given) != n):
            raise ValueError(f"labels must be an integer or ({n},); got {tuple(given.shape)}")
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < model.n_classes:
            raise ValueError(
                f"labels must be in [0, {model.n_classes}), the model's classes; got "
                f"{int(given.min())} .. {int(given.max())}"
            )
        return given.to("cpu", torch.int64).expand(n).clone()

    def samples(self, n: int) -> Tensor:
        """Returns the indices (n,) int64 of n samples."""
        from ncsn_fast.ops import noise

        return noise.sample_indices(self.start, n)


CALL_PARAMETERS = [
    *(
        p.replace(kind=p.KEYWORD_ONLY)
        for p in inspect.signature(SamplingCall).parameters.values()
        if p.name != "options"
    ),
    *methods.parameters(),
]


def check_form(model: ScoreModel, output: Output) -> None:
    """Raises ValueError unless samples of a model can be given in this form."""
    from ncsn_fast.data.images import check_output

    check_output(output)
    images = len(model.sample_shape) == 3 and model.bounded
    if output != "pt" and not images:
        raise ValueError(
            f"output={output!r} is of images with a data_range; this model's samples are "
            f"{tuple(model.sample_shape)}: use output='pt'"
        )


def takes(parameters: Iterable[inspect.Parameter], explained: str = "") -> Callable[[F], F]:
    """Decorates a function: its signature lists the keyword parameters that **options accepts.

    Args:
        explained: paragraphs to add to the docstring.
    """
    shown = list(parameters)

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *own, rest = signature.parameters.values()
        assert rest.kind is rest.VAR_KEYWORD
        more = [p for p in shown if p.name not in signature.parameters]
        function.__signature__ = signature.replace(parameters=[*own, *more, rest])  # type: ignore[attr-defined]
        if explained and function.__doc__ is not None:  # None under python -OO
            function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\n{explained}"
        return function

    return decorate


def keywords_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns the keyword-only parameters of a function's signature."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.KEYWORD_ONLY]
