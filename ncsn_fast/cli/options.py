"""Command-line options that several commands share, under the same names everywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ncsn_fast.diffusion.schedule import Schedule
from ncsn_fast.ops.noise import check_uint32
from ncsn_fast.sampler import Sampler
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.predictor_corrector import Corrector, Norm, Order, Predictor
from ncsn_fast.samplers.procedure_methods import Chain


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
    compile_cache: Path | None = None
    """Folder for what the engine compiles (trt); without it one below ~/.cache."""
    engine_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the engine's own, as NAME VALUE pairs: graph step, batch 1:64:256."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            if (value := getattr(self, name)) is not None:
                check_count(f"--{name.replace('_', '-')}", value)

    def sampler(self) -> Sampler:
        """The Sampler that these options describe."""
        return Sampler(
            self.model,
            engine=self.engine,
            dtype=self.dtype,
            device=self.device,
            batch_size=self.batch_size,
            threads=self.threads,
            compile_cache=self.compile_cache,
            **self.engine_options,
        )


@dataclasses.dataclass(frozen=True)
class SamplingOptions(ModelOptions):
    """Which samples, and how they are drawn."""

    seed: int = 0
    """Seed of all noise."""
    start: int = 0
    """Index of the first sample."""
    method: Literal[
        "ald", "fast", "cas", "euler", "heun", "dpmpp", "em", "reverse", "ancestral", "pc", "ode",
        "adaptive",
    ] = "ald"  # fmt: skip
    """Annealed Langevin dynamics; its quality in 30 evaluations; consistent annealed sampling;
    Euler's, Heun's (EDM) and DPM-Solver++'s method on the probability flow; Euler-Maruyama, reverse
    diffusion and ancestral sampling of the reverse SDE; predictor-corrector; the flow, and the SDE,
    by steps that adapt."""
    steps: int | None = None
    """Noise levels, or steps in time (em). Without it the model's own ladder; 30 for fast, 50 for
    euler, 18 for heun (two evaluations each), 20 for dpmpp, 500 for em. None for ode, adaptive."""
    schedule: Schedule | None = None
    """Where the levels lie (all but ald, cas, em, ode, adaptive): ladder takes trained ones;
    geometric; karras and polynomial bend with --rho. Without it geometric, or trained ones if the
    network needs them."""
    rho: float | None = None
    """Bend of the schedule (default: karras 7, polynomial 1.5)."""
    n_steps_each: int | None = None
    """Langevin steps per level (ald)."""
    n_sigma: int | None = None
    """Cut every step between two levels into this many (cas)."""
    epsilon: float | None = None
    """Langevin step size (the published step_lr)."""
    form: Literal["code", "paper"] | None = None
    """code: x + a s + sqrt(2a) z; paper: half that a (ald). Without it the model's own."""
    eta: float | None = None
    """Share of noise, from 0 for the flow to 1 for the SDE (ancestral, dpmpp; default
    1), and beyond (fast; default 4)."""
    churn: float | None = None
    """S_churn, noise added before steps (euler, heun; default 0)."""
    s_min: float | None = None
    """Smallest sigma that churn acts on."""
    s_max: float | None = None
    """Largest sigma that churn acts on."""
    s_noise: float | None = None
    """Scale of the noise (euler, heun, dpmpp, fast; default 1)."""
    t_end: float | None = None
    """Time of the last step, from 0 to 1 (em; default 0.001)."""
    predictor: Predictor | None = None
    """Predictor (pc; default reverse_diffusion)."""
    corrector: Corrector | Chain | None = None
    """Corrector (pc; default langevin): the published langevin and annealed, or a Markov chain."""
    corrector_steps: int | None = None
    """Corrector steps at each level (pc; default 1)."""
    order: Order | None = None
    """Which comes first at a level (pc; default corrector_first)."""
    snr: float | None = None
    """Signal-to-noise ratio of the step of langevin and annealed (pc; default 0.16)."""
    relative_step: float | None = None
    """Step of ula, mala and hmc, in units of sigma (pc; default: samplers/correctors.py)."""
    norm: Norm | None = None
    """Whose norms set the corrector's step: each sample's own (default), or means over the
    micro-batch, as published (pc)."""
    rtol: float | None = None
    """Relative tolerance of a step (ode, default 0.001; adaptive, default 0.02)."""
    atol: float | None = None
    """Absolute tolerance of a step (ode, default 0.001; adaptive, default 1/256)."""
    denoise: bool = True
    """Finish with the posterior mean instead of a noisy sample (pc: without the last noise)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_uint32("--seed", self.seed)
        check_uint32("--start", self.start)
        if self.draws():
            methods.check_options(self.method, set(self.method_options()) - {"method", "steps"})

    def draws(self) -> bool:
        """Whether the command draws samples at all."""
        return True

    def method_options(self) -> dict[str, Any]:
        """Keyword arguments for the sampler's methods; only what was given."""
        others = {field.name for field in dataclasses.fields(ModelOptions)} | {"seed", "start"}
        names = [f.name for f in dataclasses.fields(SamplingOptions) if f.name not in others]
        values = {name: getattr(self, name) for name in names}
        return {k: v for k, v in values.items() if v is not None or k == "steps"}


def check_png(name: str, path: Path | None) -> None:
    """ValueError unless a picture's path, if there is one, ends in .png."""
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"{name} must end in .png, as pictures are written so; got {str(path)!r}")


def check_count(name: str, value: int, least: int = 1, most: int = 2**32) -> None:
    """ValueError unless an option's value is at least `least`, and no more than samples can be."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}; got {value}")
