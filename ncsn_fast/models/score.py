"""ScoreModel: a network, its noise ladder, and how it is conditioned on the noise level."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast import sigmas as ladders
from ncsn_fast.models.refinenet import RefineNet


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that config.json holds: enough to rebuild the network and to sample from it.

    epsilon is the Langevin step size in x + alpha s + sqrt(2 alpha) z with alpha_i = epsilon
    sigma_i^2 / sigma_L^2 (the published `step_lr`); langevin_form "paper" halves alpha, as the
    formula of the 2019 paper has it.
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

    def __post_init__(self) -> None:
        if self.langevin_form not in ("code", "paper"):
            raise ValueError(f"langevin_form must be 'code' or 'paper'; got {self.langevin_form!r}")
        if not (0 < self.epsilon < math.inf and self.n_steps_each >= 0):
            raise ValueError(
                f"epsilon must be positive and n_steps_each at least 0; "
                f"got {self.epsilon}, {self.n_steps_each}"
            )
        ladders.geometric(self.sigma_begin, self.sigma_end, self.n_sigmas)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Config from JSON values; ValueError names unknown fields and fields of a wrong type."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"unknown model config fields: {', '.join(unknown)}")
        kwargs = {name: _convert(name, fields[name].type, value) for name, value in values.items()}
        return cls(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "image_size": list(self.image_size)}


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


class ScoreModel(nn.Module):
    """score(x, sigma) = grad log p_sigma(x), from a network of the NCSN family.

    The raw network output f relates to the score by `score_factor`: score = score_factor(sigma) *
    f. NCSNv2 networks do not see the level (f = sigma * score), so any sigma > 0 is legal; NCSN
    (2019) networks see the index of the nearest trained level (in log sigma) and f is the score
    itself.
    """

    def __init__(self, config: ModelConfig, sigmas: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.net = RefineNet(
            config.arch,
            channels=config.channels,
            ngf=config.ngf,
            n_levels=config.n_sigmas,
            act=config.act,
            norm=config.norm,
            scale_input=config.scale_input,
        )
        if sigmas is None:
            sigmas = ladders.geometric(config.sigma_begin, config.sigma_end, config.n_sigmas)
        ladders.check_ladder(sigmas)
        if len(sigmas) != config.n_sigmas:
            raise ValueError(f"expected {config.n_sigmas} sigmas; got {len(sigmas)}")
        self.sigmas: Tensor
        self.register_buffer("sigmas", sigmas.to(torch.float32).clone())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a model folder (config.json and model.safetensors) and returns it."""
        from ncsn_fast.checkpoint import save_model  # imports this module

        return save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ScoreModel:
        """Reads a model folder; CheckpointError if it is not one, or does not fit."""
        from ncsn_fast.checkpoint import load_model_folder  # imports this module

        return load_model_folder(Path(folder).expanduser())

    @property
    def conditional(self) -> bool:
        """True where the network sees the noise level (NCSN 2019)."""
        return self.net.arch.conditional

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, *self.config.image_size)

    @property
    def device(self) -> torch.device:
        return self.sigmas.device

    def nearest_level(self, sigma: Tensor | float) -> Tensor:
        """Index of the trained level nearest to sigma in log sigma; int64, shape of sigma."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=self.device)
        gaps = (sigma.log()[..., None] - self.sigmas.double().log()).abs()
        return gaps.argmin(dim=-1)

    def score_factor(self, sigma: Tensor | float) -> Tensor | float:
        """The factor from the raw network output f to the score at sigma."""
        if self.conditional:
            return torch.ones_like(sigma) if isinstance(sigma, Tensor) else 1.0
        return 1.0 / sigma

    def digest(self) -> str:
        """SHA-256 of the configuration and all weights: equal for equal models, wherever stored."""
        total = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            total.update(key.encode())
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Raw network output f for x (N, C, H, W).

        `level` (N,) int64 is read by the networks that are conditioned on it, and by no other.
        """
        return self.net(x, level if self.conditional else None)

    def score_at(self, x: Tensor, level: Tensor | int) -> Tensor:
        """Score at a trained level: an index in [0, n_sigmas), or one per sample (N,) int64."""
        level = torch.as_tensor(level, dtype=torch.int64, device=x.device)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x)):
            raise ValueError(
                f"level must be an index or ({len(x)},); got shape {tuple(level.shape)}"
            )
        if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < len(self.sigmas):
            raise ValueError(f"level must be in [0, {len(self.sigmas)}); got {level.tolist()}")
        level = level.expand(len(x))
        f = self(x, level)
        if self.conditional:
            return f
        return f / self.sigmas[level][:, None, None, None]

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Score at noise level sigma > 0: a number, or one per sample (N,)."""
        sigma = each_sigma(sigma, x)
        if self.conditional:
            return self(x, self.nearest_level(sigma))
        return self(x) / sigma[:, None, None, None]

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Tweedie's formula: the posterior mean x + sigma^2 score(x, sigma)."""
        sigma = each_sigma(sigma, x)
        return x + sigma.square()[:, None, None, None] * self.score(x, sigma)


def each_sigma(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Noise levels (N,) float32 of x (N, ...), from one number or one per sample.

    ValueError unless they are positive and finite.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
        raise ValueError(f"sigma must be a number or ({len(x)},); got shape {tuple(sigma.shape)}")
    if not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise ValueError(f"sigma must be positive and finite; got {sigma.tolist()}")
    return sigma.expand(len(x))
