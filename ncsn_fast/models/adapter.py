"""Networks that users bring: their description, and the module that calls them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast.data import limits
from ncsn_fast.data.json_file import make_plain, plain
from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.parameterisation import Parameterisation, from_spec


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ParameterisedConfig:
    """Description of a model by the parameterisation of its network, and its noise levels.

    Attributes:
        parameterisation: of the network.
        n_sigmas, sigma_begin, sigma_end: the ladder, in the unit of x.
        epsilon, n_steps_each, langevin_form: of Langevin dynamics, as in ModelConfig.
    """

    parameterisation: Parameterisation
    n_sigmas: int
    sigma_begin: float
    sigma_end: float
    epsilon: float
    n_steps_each: int = 5
    langevin_form: str = "code"

    def __post_init__(self) -> None:
        make_plain(self)
        for name, least in (("n_sigmas", 1), ("n_steps_each", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} must be an integer from {least} on; got {value!r}")
        for name in ("sigma_begin", "sigma_end", "epsilon"):
            if type(value := getattr(self, name)) is not float or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        if self.langevin_form not in ("code", "paper"):
            raise ValueError(f"langevin_form must be 'code' or 'paper'; got {self.langevin_form!r}")

    @property
    def conditioning(self) -> str:
        """Kind of the network's second input."""
        if self.parameterisation.c_noise is None:
            return "none"
        spec = self.parameterisation.spec
        return "noise" if spec is None else str(spec["sees"])

    def ladder(self) -> Tensor:
        """Returns geometric noise levels, descending float32."""
        return schedule.geometric(self.sigma_begin, self.sigma_end, self.n_sigmas)

    def check_steps(self) -> None:
        """ValueError if Langevin dynamics would take more steps than files may ask for."""
        limits.STEPS.check(self.n_sigmas * max(1, self.n_steps_each), "the ladder")


def read_parameterisation(spec: Any) -> Parameterisation:
    """Returns the parameterisation that a file describes; ValueError or TypeError if it is none."""
    process = spec.get("process") if isinstance(spec, dict) else None
    if isinstance(process, dict) and "n" in process:
        check_chain(process["n"])
    return from_spec(spec)


def check_chain(n: Any) -> None:
    """ValueError unless a discrete chain has a number of steps that files may ask for."""
    if type(n) is not int or n < 2:
        raise ValueError(f"the number of steps of a chain must be an integer from 2 on; got {n!r}")
    limits.STEPS.check(n, "a discrete chain")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class WrappedConfig(ParameterisedConfig):
    """Description of a model with a network that is not of this package.

    Attributes:
        arch: name of the network's class.
        sample_shape: shape of one sample as the network takes it.
        n_classes: of a network that takes labels.
        no_class: whether it takes the label n_classes too, which means no class.
        bounded: whether samples are in [0, 1].
        diffusers: configuration of a network of diffusers, from which loading builds it again.
        identity: of the network's code and settings, which its weights do not tell.
    """

    arch: str
    sample_shape: tuple[int, ...]
    n_classes: int = 0
    no_class: bool = True
    bounded: bool = True
    diffusers: Mapping[str, Any] | None = None
    identity: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.n_classes) is not int or self.n_classes < 0:
            raise ValueError(f"n_classes must be an integer from 0 on; got {self.n_classes!r}")
        if type(self.no_class) is not bool:
            raise ValueError(f"no_class must be true or false; got {self.no_class!r}")

    @property
    def channels(self) -> int:
        """Channels of the state."""
        return self.sample_shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the state: (C, L) is (C, 1, L), (C, D, H, W) is (C, D H, W)."""
        rest = self.sample_shape[1:]
        return (1, 1) if not rest else (math.prod(rest[:-1]), rest[-1])

    def to_dict(self) -> dict[str, Any]:
        """Returns values for JSON; TypeError if the parameterisation has functions of the user."""
        spec = self.parameterisation.spec
        if spec is None:
            raise TypeError(
                "a Parameterisation of your own functions cannot be written to a file; save the "
                "network's state_dict() and wrap it again"
            )
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["identity"]
        if self.diffusers is None:
            del values["diffusers"]
        if self.no_class:  # as it was before this was said, for digests
            del values["no_class"]
        shape = list(self.sample_shape)
        return {**values, "sample_shape": shape, "parameterisation": plain(dict(spec))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], identity: str = "") -> WrappedConfig:
        """Returns the description that `to_dict` gave; ValueError or TypeError if it is none.

        identity: of the network.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"identity"}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model config fields: {', '.join(unknown)}")
        fields = dict(values)
        shape = fields["sample_shape"]
        if not (isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)):
            raise ValueError(f"sample_shape must be positive integers; got {shape!r}")
        limits.BATCH_ELEMENTS.check(math.prod(shape), "sample_shape")
        fields["sample_shape"] = tuple(shape)
        fields["parameterisation"] = read_parameterisation(fields["parameterisation"])
        config = cls(**fields, identity=identity)
        config.check_steps()
        return config


class Adapter(nn.Module):
    """Calls a network that takes samples in their own shape, and returns its output as a tensor.

    Args:
        net: net(x), net(x, c) or net(x, c, labels), with x (N, *shape) and c, labels (N,).
        shape: of one sample.   conditioned, labelled: which of the others it takes.
    """

    def __init__(
        self, net: nn.Module, shape: tuple[int, ...], *, conditioned: bool, labelled: bool
    ) -> None:
        super().__init__()
        self.net, self.shape = net, shape
        self.conditioned, self.labelled = conditioned, labelled

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x (N, C, H, W) views samples of the network's shape."""
        rest = self.shape[1:]
        size = (1, 1) if not rest else (math.prod(rest[:-1]), rest[-1])
        expected = (self.shape[0], *size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"this network takes samples of shape {self.shape}; got states {tuple(x.shape)}, "
                f"not (N, {', '.join(map(str, expected))})"
            )

    def forward(
        self, x: Tensor, condition: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Computes the network's output for states x (N, C, H, W), in their shape."""
        arguments = [x if len(self.shape) == 3 else x.reshape(x.shape[0], *self.shape)]
        if self.conditioned and condition is not None:
            arguments.append(condition)
        if self.labelled and labels is not None:
            arguments.append(labels)
        output = _tensor(self.net(*arguments))
        if output.shape != arguments[0].shape:
            raise ValueError(
                f"the network returned the shape {tuple(output.shape)} for samples "
                f"{tuple(arguments[0].shape)}; they must be equal"
            )
        return output if len(self.shape) == 3 else output.reshape(x.shape)


def _tensor(output: Any) -> Tensor:
    """Returns the tensor of an output: itself, its field or key `sample`, or the first of a tuple.

    TypeError for anything else.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("sample"), Tensor):
        return output["sample"]
    if isinstance(getattr(output, "sample", None), Tensor):
        return output.sample
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        "a network must return a tensor, or an object with a tensor `sample`; got "
        f"{type(output).__name__}"
    )


def identity_of(net: nn.Module) -> str:
    """Returns a SHA-256 of a network's code and settings: classes, sources, simple attributes.

    Networks of equal weights and identity compute the same. Where a source cannot be read, as in a
    notebook that was restarted, every call returns another one.
    """
    total = hashlib.sha256(torch.__version__.encode())
    for name, module in net.named_modules():
        kind: Any = type(module)
        try:
            source = _source(kind)
        except (OSError, TypeError):
            return uuid.uuid4().hex
        simple = {k: v for k, v in vars(module).items() if _is_simple(v) and k[0] != "_"}
        simple.pop("training", None)
        total.update(repr((name, kind.__module__, kind.__qualname__, source)).encode())
        total.update(repr(sorted(simple.items())).encode())
        if any(callable(v) or not _is_simple(v) for k, v in vars(module).items() if k[0] != "_"):
            return uuid.uuid4().hex
    return total.hexdigest()


@functools.lru_cache(maxsize=1000)
def _source(kind: type) -> str:
    """The source of a class, for which Python reads the whole of its file."""
    return inspect.getsource(kind)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    if isinstance(value, dict):
        return all(map(_is_simple, [*value.keys(), *value.values()]))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def forward_parameters(net: nn.Module) -> list[inspect.Parameter]:
    """Returns the positional parameters of a network's forward method, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(net.forward).parameters.values() if p.kind in kinds]
