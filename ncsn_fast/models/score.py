"""ScoreModel: a network, its noise levels, and its conditioning on the noise level."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ncsn_fast.data import limits
from ncsn_fast.data.json_file import make_plain
from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.diffusion.parameterisation import Parameterisation, standard
from ncsn_fast.models.adapter import WrappedConfig
from ncsn_fast.models.architectures import (
    ARCHITECTURES,
    TIME_ARCHS,
    TIME_STYLE,
    check_image_size,
)
from ncsn_fast.models.classes import default_label
from ncsn_fast.models.inputs import check_call, each_sigma
from ncsn_fast.models.layers import ACTIVATIONS, NORMS
from ncsn_fast.models.refinenet import RefineNet
from ncsn_fast.models.score_unet import ScoreUNet
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.models.unet import Clock, TimeUNet
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.names import suggestion


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Content of config.json: everything needed to rebuild the network and to sample from it.

    It is of the RefineNets and the tutorial's U-Nets; UNetConfig is that of NCSN++ and its like.
    epsilon is the Langevin step size in x + alpha s + sqrt(2 alpha) z with alpha_i = epsilon
    sigma_i^2 / sigma_L^2 (the published `step_lr`); langevin_form "paper" halves alpha, as in the
    formula of the 2019 paper. Time-conditioned networks have sigma_min and sigma_max, the ends of
    their sigma(t) (models/unet.py); their ladder is for samplers that need one.
    """

    arch: str = "ncsnv2"
    image_size: tuple[int, int] = (32, 32)
    channels: int = 3
    ngf: int = 128
    act: str = "elu"
    norm: str = "InstanceNorm++"
    scale_input: bool = True
    n_sigmas: int = 232
    sigma_begin: float = 50.0
    sigma_end: float = 0.01
    epsilon: float = 6.2e-6
    n_steps_each: int = 5
    langevin_form: str = "code"
    sigma_min: float = 0.0
    sigma_max: float = 0.0

    n_classes: ClassVar[int] = 0
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        make_plain(self)
        self._check_fields()
        if self.langevin_form not in ("code", "paper"):
            raise ValueError(f"langevin_form must be 'code' or 'paper'; got {self.langevin_form!r}")
        if not (0 < self.epsilon < math.inf and self.n_steps_each >= 0):
            raise ValueError(
                f"epsilon must be positive and n_steps_each at least 0; "
                f"got {self.epsilon}, {self.n_steps_each}"
            )
        ladders.geometric(self.sigma_begin, self.sigma_end, self.n_sigmas)
        if self.arch in TIME_ARCHS:
            last = float(self.clock().std(1.0))
            if self.sigma_begin > last * (1 + 1e-6):
                raise ValueError(
                    f"sigma_begin must be at most {last:.6g}, the noise at time 1, which grows "
                    f"with sigma_max={self.sigma_max:g}; got {self.sigma_begin:g}"
                )
            for name, value in TIME_STYLE.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{self.arch} has {name} {value!r}; got {getattr(self, name)!r}"
                    )
        elif self.sigma_min or self.sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max belong to {', '.join(TIME_ARCHS)}, not {self.arch!r}; "
                "a ladder has sigma_begin and sigma_end"
            )

    def _check_fields(self) -> None:
        """ValueError for values of another kind, or beyond what files may ask for."""
        least = {"channels": 1, "ngf": 1, "n_sigmas": 1, "n_steps_each": 0}
        wrong = [
            f"{name} must be an integer from {low} on; got {value!r}"
            for name, low in least.items()
            if type(value := getattr(self, name)) is not int or value < low
        ]
        wrong += [
            f"{name} must be a number; got {value!r}"
            for name in ("sigma_begin", "sigma_end", "epsilon", "sigma_min", "sigma_max")
            if type(value := getattr(self, name)) is not float
        ]
        tables: dict[str, Iterable[Any]] = {
            "arch": (*ARCHITECTURES, *TIME_ARCHS), "act": ACTIVATIONS,
            "norm": (*NORMS, TIME_STYLE["norm"]),
        }  # fmt: skip
        wrong += [
            f"{name} must be one of {', '.join(map(str, known))}; got {value!r}"
            f"{suggestion(value, filter(None, known))}"
            for name, known in tables.items()
            if (value := getattr(self, name)) not in list(known)
        ]
        if type(self.scale_input) is not bool:
            wrong.append(f"scale_input must be one of True, False; got {self.scale_input!r}")
        size = self.image_size
        if type(size) is not tuple or len(size) != 2 or not all(type(n) is int for n in size):
            wrong.append(f"image_size must be (height, width); got {size!r}")
        elif min(size) < 1:
            wrong.append(f"image_size must be positive; got {size!r}")
        if wrong:
            raise ValueError("; ".join(wrong))
        limits.IMAGE_SIZE.check(max(size), f"image_size {size[0]}x{size[1]}")
        limits.WIDTH.check(
            max(self.channels, self.ngf), f"channels {self.channels}, ngf {self.ngf}"
        )
        steps = self.n_sigmas * max(1, self.n_steps_each)
        limits.STEPS.check(steps, f"n_sigmas {self.n_sigmas}, n_steps_each {self.n_steps_each}")
        check_image_size(self.arch, *size)

    def clock(self) -> Clock:
        """Returns the mapping between time and noise level of a time-conditioned network."""
        return Clock(TIME_ARCHS[self.arch], self.sigma_min, self.sigma_max)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return (self.channels, *self.image_size)

    @property
    def conditioning(self) -> str:
        """Kind of the network's second input: "none", "level" or "time"."""
        if self.arch in TIME_ARCHS:
            return "time"
        return "level" if ARCHITECTURES[self.arch].conditional else "none"

    def ladder(self) -> Tensor:
        """Returns the noise levels, descending float32."""
        return ladders.geometric(self.sigma_begin, self.sigma_end, self.n_sigmas)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Builds the config from JSON values.

        Raises ValueError that names unknown fields and fields of a wrong type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"unknown model config fields: {', '.join(unknown)}")
        kwargs = {name: _convert(name, fields[name].type, value) for name, value in values.items()}
        return cls(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns values for JSON; includes sigma_min and sigma_max if the network has them."""
        values = {**dataclasses.asdict(self), "image_size": list(self.image_size)}
        if self.arch not in TIME_ARCHS:
            del values["sigma_min"], values["sigma_max"]
        return values


def _convert(name: str, kind: Any, value: Any) -> Any:
    wrong = ValueError(f"model config field {name!r} must be {kind}; got {value!r}")
    if name == "image_size":
        ok = (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(type(v) is int and v > 0 for v in value)
        )
        if not ok:
            raise wrong
        return tuple(value)
    if kind == "float" and type(value) in (int, float):
        return float(value)
    if kind != type(value).__name__:
        raise wrong
    return value


def config_from_dict(values: dict[str, Any]) -> ModelConfig | UNetConfig:
    """Builds the config of a network of this package from JSON values.

    Raises ValueError or TypeError if they are none.
    """
    return UNetConfig.from_dict(values) if "network" in values else ModelConfig.from_dict(values)


def build_network(config: ModelConfig | UNetConfig) -> RefineNet | TimeUNet | ScoreUNet:
    """Builds the network of a config with random weights.

    ValueError for an unknown architecture.
    """
    if isinstance(config, UNetConfig):
        return ScoreUNet(config.network)
    if config.arch in TIME_ARCHS:
        return TimeUNet(TIME_ARCHS[config.arch], channels=config.channels, ngf=config.ngf)
    if config.arch not in ARCHITECTURES:
        names = ", ".join((*ARCHITECTURES, *TIME_ARCHS))
        raise ValueError(f"arch must be one of {names}; got {config.arch!r}")
    return RefineNet(
        config.arch,
        channels=config.channels,
        ngf=config.ngf,
        n_levels=config.n_sigmas,
        act=config.act,
        norm=config.norm,
        scale_input=config.scale_input,
    )


class ModelStorage(Protocol):
    """Writing and reading of models; checkpoints/, which imports models/, implements it."""

    def save(self, model: ScoreModel, folder: Path) -> Path:
        """Writes a model and returns the folder."""

    def load(self, source: str | Path) -> ScoreModel:
        """Reads a model in evaluation mode."""

    def push(self, model: ScoreModel, repo_id: str, **options: Any) -> str:
        """Uploads a model to the Hugging Face Hub, and returns its address."""


class ScoreModel(nn.Module):
    """Score network: score(x, sigma) = grad log p_sigma(x), for x = clean + sigma z.

    `parameterisation` (diffusion/parameterisation.py) converts the raw network output F to the
    score, and sigma to the network's second input:

    - NCSNv2: no second input; F = sigma * score, so any sigma > 0 is valid;
    - NCSN (2019): the nearest trained level (in log sigma); F is the score itself;
    - the tutorial's U-Net: the time t at which the noise is sigma; F = sigma * score;
    - NCSN++, DDPM++, DDPM and EDM's networks: that of their UNetConfig;
    - any other network: see `ncsn_fast.wrap`.

    Attributes:
        config: its description; ModelConfig or UNetConfig for the networks of this package.
        net: the network, called as net(u, condition) or net(u, condition, labels).
        sigmas: (n_sigmas,) float32, descending.
        clock: mapping between time and sigma, for the tutorial's U-Net; else None.
        tuned: table of method "fast" that was fitted to the model (`ncsn_fast.tune`); else None.
        storage: reader and writer of models; checkpoints/model_folder.py sets it.
    """

    storage: ClassVar[ModelStorage]

    def __init__(
        self,
        config: ModelConfig | UNetConfig | WrappedConfig,
        sigmas: Tensor | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        if net is None:
            if isinstance(config, WrappedConfig):
                raise TypeError("a network of your own comes with its module: use ncsn_fast.wrap")
            net = build_network(config)
        self.net = net
        self.clock: Clock | None = None
        self.tuned: TunedTable | None = None
        if isinstance(config, ModelConfig) and config.arch in TIME_ARCHS:
            self.clock = config.clock()
        if sigmas is None:
            sigmas = config.ladder()
        ladders.check_ladder(sigmas)
        if len(sigmas) != config.n_sigmas:
            raise ValueError(f"expected {config.n_sigmas} sigmas; got {len(sigmas)}")
        self.sigmas: Tensor
        self.register_buffer("sigmas", sigmas.to(torch.float32).clone())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a model folder (config.json and model.safetensors) and returns it.

        TypeError for a subclass, which loading would not restore.
        """
        return self.storage.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ScoreModel:
        """Reads a model folder, here or on the Hugging Face Hub; CheckpointError if invalid."""
        return cls.storage.load(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        message: str = "Upload a model of ncsn_fast",
    ) -> str:
        """Uploads a model folder to the Hugging Face Hub, and returns its address.

        Args:
            repo_id: OWNER/NAME of the repository, which is made if there is none.
            private: whether a new repository is; None leaves it to the owner's settings.
            revision: branch to commit to, made if there is none; None for the default one.
            token: of the account; None for the one that is logged in.
            message: of the commit.

        Raises:
            CheckpointError: no permission, no connection, or huggingface_hub is not installed.
        """
        return self.storage.push(
            self, repo_id, private=private, revision=revision, token=token, message=message
        )

    @property
    def parameterisation(self) -> Parameterisation:
        """Functions that make the score of the network's output; see the class."""
        if not isinstance(self.config, ModelConfig):
            return self.config.parameterisation
        if self.config.conditioning == "level":
            known = standard("score", sees="nothing")
            return dataclasses.replace(
                known, c_noise=self.nearest_level, noise_dtype=torch.int64, spec=None
            )
        known = standard("scaled_score", sees="nothing")
        if self.clock is None:
            return known
        last = float(self.clock.std(1.0))
        return dataclasses.replace(known, c_noise=self.clock.time, largest=last, spec=None)

    @property
    def conditional(self) -> bool:
        """Whether the network takes the index of a trained level, and so accepts no other level."""
        return self.conditioning == "level"

    @property
    def conditioning(self) -> str:
        """Kind of the network's noise level input: "none", "level", "time", "sigma", ..."""
        return self.config.conditioning

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the state of one sample; an image, or a view of other data."""
        return (self.config.channels, *self.config.image_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as callers see it; that of the state, for images."""
        return self.config.sample_shape

    @property
    def bounded(self) -> bool:
        """Whether samples are in [0, 1]."""
        return self.config.bounded

    @property
    def n_classes(self) -> int:
        """Number of classes of a network that takes labels; 0 for others."""
        return self.config.n_classes

    @property
    def device(self) -> torch.device:
        """Device of the noise levels and weights."""
        return self.sigmas.device

    def nearest_level(self, sigma: Tensor | float) -> Tensor:
        """Returns the index of the trained level nearest in log sigma; int64, shape of sigma."""
        device = sigma.device if isinstance(sigma, Tensor) else self.device
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=device)
        gaps = (sigma.log()[..., None] - self.sigmas.to(device).double().log()).abs()
        return gaps.argmin(dim=-1)

    def condition(self, sigma: Tensor | float) -> Tensor | None:
        """Returns the network's second input at noise level sigma, in the shape of sigma.

        int64 levels, float32 numbers, or None for networks without one; on the device of sigma, or
        of the model if sigma is a number.
        """
        if not isinstance(sigma, Tensor):
            sigma = torch.as_tensor(sigma, dtype=torch.float64, device=self.device)
        found = self.parameterisation.condition(sigma)
        return None if found is None else found.to(sigma.device)

    def digest(self) -> str:
        """Returns the SHA-256 of the configuration and all weights.

        Equal models have equal digests.
        """
        total = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        if isinstance(self.config, WrappedConfig):
            total.update(self.config.identity.encode())
        for key, value in sorted(self.state_dict().items()):
            total.update(key.encode())
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def forward(
        self, u: Tensor, condition: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Computes the raw network output F for the network's input u (N, C, H, W).

        Conditioned networks read `condition` (N,), as returned by the method `condition`; others
        ignore it. labels (N,) int64 are for networks with classes; n_classes means no class.
        """
        condition = None if self.conditioning == "none" else condition
        if self.n_classes == 0:
            return self.net(u, condition)
        if labels is None:
            labels = torch.full((len(u),), default_label(self.config) or 0, device=u.device)
        return self.net(u, condition, labels)

    def check_input(self, u: Tensor) -> None:
        """Raises ValueError unless u is a batch of states that the network accepts."""
        net: Any = self.net  # RefineNet, TimeUNet, ScoreUNet, Adapter, or a subclass's own
        net.check_input(u)

    def score_at(self, x: Tensor, level: Tensor | int) -> Tensor:
        """Computes the score at a trained level: an index in [0, n_sigmas), or (N,) int64."""
        check_call(self, x)
        level = torch.as_tensor(level, device=x.device)
        if level.is_floating_point() or level.is_complex():
            raise TypeError(f"level must be an integer or a tensor of them; got {level.dtype}")
        level = level.to(torch.int64)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x)):
            raise ValueError(
                f"level must be an index or ({len(x)},); got shape {tuple(level.shape)}"
            )
        if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < len(self.sigmas):
            raise ValueError(f"level must be in [0, {len(self.sigmas)}); got {level.tolist()}")
        return self.score(x, self.sigmas[level.expand(len(x))])

    def score(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Computes the score at noise level sigma > 0: a number, or one per sample (N,).

        labels: (N,) int64, for networks with classes.
        """
        check_call(self, x, labels)
        sigma = each_sigma(sigma, x)
        more = () if labels is None else (labels,)
        return self.score_by(lambda u, condition: self(u, condition, *more), x, sigma)

    def score_by(
        self,
        network: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        sigma: Tensor,
        parameterisation: Parameterisation | None = None,
    ) -> Tensor:
        """Computes the score from any implementation of the network.

        Args:
            network: (u, condition) -> F, as `forward`.   sigma: (N,).
            parameterisation: of the implementation; None for the model's.
        """
        form = (parameterisation or self.parameterisation).linear_form(sigma)
        row = (-1, *[1] * (x.ndim - 1))
        skip, out, const = (c / sigma.double() for c in (form.skip, form.out, form.const))
        skip, out, const, scale, shift = (
            c.to(x.device, x.dtype).view(row) for c in (skip, out, const, form.scale, form.shift)
        )
        f = network(scale * x + shift, self.condition(sigma)).to(x.dtype)
        return out * f + (skip * x + const)

    def score_at_time(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Computes the score at time t in (0, 1]: a number, or one per sample (N,).

        For the tutorial's networks only; others raise ValueError.
        """
        if self.clock is None:
            raise ValueError(f"{self.config.arch} is not conditioned on time; use score(x, sigma)")
        check_call(self, x)
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        if not bool(((t > 0) & (t <= 1)).all()):
            raise ValueError(f"t must be in (0, 1]; got {t.tolist()}")
        return self(x, t) / self.clock.std(t).to(x.dtype)[:, None, None, None]

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Computes the posterior mean x + sigma^2 score(x, sigma) (Tweedie's formula)."""
        check_call(self, x, labels)
        sigma = each_sigma(sigma, x)
        square = sigma.square().view(-1, *[1] * (x.ndim - 1))
        return x + square * self.score(x, sigma, labels)
