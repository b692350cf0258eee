"""Command-line options that several commands share, under the same names everywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ncsn_fast.noise import check_uint32
from ncsn_fast.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and what runs it."""

    model: str | None = None
    """Run folder, model folder, published .pth, or `digits` (the shipped model). Without it the
    newest run below ./runs, else the shipped model."""
    engine: Literal["auto", "eager", "compile", "cpu", "cuda", "ort", "trt"] = "auto"
    """Engine; `python -m ncsn_fast.doctor` says which run here."""
    dtype: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """Type the network computes in; without it the engine's own choice."""
    device: str | None = None
    """cpu, cuda or cuda:N; without it what the engine runs on."""
    batch_size: int | None = None
    """Images in a micro-batch."""
    threads: int | None = None
    """CPU threads."""
    engine_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the engine's own, as NAME VALUE pairs: graph step, kernels cuda."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress bar."""

    def sampler(self) -> Sampler:
        """The Sampler that these options describe."""
        return Sampler(
            self.model,
            engine=self.engine,
            dtype=self.dtype,
            device=self.device,
            batch_size=self.batch_size,
            threads=self.threads,
            **self.engine_options,
        )


@dataclasses.dataclass(frozen=True)
class SamplingOptions(ModelOptions):
    """Which samples, and how they are drawn."""

    seed: int = 0
    """Seed of all noise."""
    start: int = 0
    """Index of the first sample."""
    method: Literal["ald", "cas"] = "ald"
    """Annealed Langevin dynamics, or consistent annealed sampling."""
    steps: int | None = None
    """Noise levels; without it the model's own ladder."""
    n_steps_each: int | None = None
    """Langevin steps per level (ald)."""
    n_sigma: int | None = None
    """Cut every step between two levels into this many (cas)."""
    epsilon: float | None = None
    """Langevin step size (the published step_lr)."""
    form: Literal["code", "paper"] | None = None
    """code: x + a s + sqrt(2a) z; paper: half that a (ald). Without it the model's own."""
    denoise: bool = True
    """Finish with the posterior mean instead of a noisy sample."""

    def __post_init__(self) -> None:
        check_uint32("--seed", self.seed)
        check_uint32("--start", self.start)

    def method_options(self) -> dict[str, Any]:
        """Keyword arguments for the sampler's methods; only what was given."""
        options = {"method": self.method, "steps": self.steps, "denoise": self.denoise}
        for name in ("n_steps_each", "n_sigma", "epsilon", "form"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return options


def check_png(name: str, path: Path | None) -> None:
    """ValueError unless a picture's path, if there is one, ends in .png."""
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"{name} must end in .png, as pictures are written so; got {str(path)!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """ValueError unless an option's value is at least `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
