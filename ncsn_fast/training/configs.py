"""Training configurations: a flat dataclass, a table of the published settings, and the toy's."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ncsn_fast.data import limits
from ncsn_fast.data.decode import parse_colour
from ncsn_fast.data.json_file import make_plain
from ncsn_fast.models.architectures import TIME_ARCHS, TIME_STYLE, check_image_size
from ncsn_fast.models.published_runs import PUBLISHED_RUNS
from ncsn_fast.models.unet_architectures import (
    EDM_PRECONDITIONINGS,
    SCORE_SDE_PRECONDITIONINGS,
    UNETS,
    DDPMConfig,
    NCSNppConfig,
    UNetSettings,
)

if TYPE_CHECKING:  # the command line has these options before torch is imported
    from ncsn_fast.models.score import ModelConfig
    from ncsn_fast.models.unet_config import UNetConfig

# Numeric fields of TrainConfig: smallest value, and exclusive upper bound.
_BOUNDS: tuple[tuple[str, float, float], ...] = (
    *((name, 1, math.inf) for name in (
        "image_size", "ngf", "n_steps_each", "batch_size", "steps", "log_every", "snapshot_every",
        "keep", "accumulate",
    )),
    *((name, 0, math.inf) for name in (
        "centre_crop", "workers", "sigma_begin", "n_sigmas", "epsilon", "warmup", "anneal_power",
        "grad_clip", "threads", "grid", "sigma_min", "sigma_max", "held_out", "max_minutes",
        "n_blocks", "dropout",
    )),
    ("ema", 0, 1),
    ("label_dropout", 0, 1),
    ("overlap", 0, 1),
    ("seed", 0, 2**32),
)  # fmt: skip

# Largest values of counts. More is a slip, whose memory could end the process.
_ONE_FLAG: Any = None  # of --dry-run, without --no-dry-run
with contextlib.suppress(ImportError):  # tyro, which the command line alone needs
    _ONE_FLAG = importlib.import_module("tyro.conf").FlagCreatePairsOff
_MOST = {
    "image_size": 2**16, "ngf": 2**16, "n_sigmas": 2**24, "n_steps_each": 2**31, "grid": 2**16,
    "batch_size": 2**31, "centre_crop": 2**31, "workers": 2**10, "threads": 2**16,
    "steps": 2**30,  # of the noise contract (draws.LARGEST_STEP)
    "accumulate": 2**31, "held_out": 2**31,
    **dict.fromkeys(("warmup", "log_every", "snapshot_every", "keep"), 2**53),
}  # fmt: skip


_CLASS_ARCHS = tuple(arch for arch, kind in UNETS.items() if "label_dim" in kind.names())
LARGEST_STEP = 1e30  # of Adam, whose numbers are float32


def check_positive(name: str, value: float, most: float = math.inf) -> None:
    """Raises ValueError unless a value is positive, finite and at most `most`."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive; got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:g}; got {value:g}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run; 0 means that the run derives the value."""

    name: str = "digits"
    """Run name; the run is written to <runs>/<name>."""
    runs: str = "runs"
    """Folder that holds the runs."""

    data: str = "digits"
    """digits, a folder or zip of images (any depth), IDX (MNIST) or CIFAR folders, CIFAR.tar.gz, an
    .npy or .npz file, LSUN's LMDB, or hf:NAME (Hugging Face); SOURCE:test for another split."""
    image_size: int = 16
    """Height and width the network is trained on, in pixels."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for RGB; images are converted."""
    centre_crop: int = 0
    """Centre crop of this many pixels before resizing; 0 for none."""
    background: str = "white"
    """Colour below the transparent pixels of images."""
    flip: bool = False
    """Random horizontal flips."""
    dequantise: bool = False
    """Add uniform noise below one grey level, x * 255/256 + U/256, as NCSN (2019) does."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the training process. Images are decoded once,
    before the first step, if all fit into 2 GiB at the size of the network, else in each epoch."""
    skip_damaged: bool = False
    """Leave out images that cannot be read, which are counted before the first step."""

    arch: Literal[
        "ncsnv2",
        "ncsnv2_deeper",
        "ncsnv2_deepest",
        "ncsn",
        "ncsn_deeper",
        "unet_a",
        "unet_b",
        "unet_c",
        "ncsnpp",
        "ddpmpp",
        "ddpm",
        "songunet",
        "dhariwal",
    ] = "ncsnv2"
    """Network; unet_a, unet_b and unet_c, the tutorials', see the time and learn at all levels;
    ncsnpp, ddpmpp and ddpm are the U-Nets of score_sde, songunet and dhariwal those of EDM."""
    ngf: int = 24
    """Width of the network's first stage."""
    act: Literal["elu", "relu", "lrelu", "swish"] = "elu"
    """Activation."""
    norm: Literal[
        "InstanceNorm++", "InstanceNorm", "VarianceNorm", "BatchNorm", "NoneNorm", "GroupNorm"
    ] = "InstanceNorm++"
    """Normalisation; all published models use InstanceNorm++, but GroupNorm (U-Nets only)."""
    preconditioning: Literal[
        "ve",
        "discrete_ve",
        "vp",
        "sub_vp",
        "discrete_vp",
        "VPPrecond",
        "VEPrecond",
        "iDDPMPrecond",
        "EDMPrecond",
    ] = "ve"
    """What a U-Net of score_sde (the first five) or of EDM predicts, and at which noise levels."""
    multiples: tuple[int, ...] = (1, 2, 2, 2)
    """Widths of a U-Net's levels, in units of ngf; each level but the first halves the image."""
    n_blocks: int = 4
    """Residual blocks of each level of a U-Net."""
    attention: tuple[int, ...] = (16,)
    """Heights of the maps at which a U-Net attends."""
    dropout: float = 0.1
    """Probability of dropout in a U-Net."""
    class_cond: bool = False
    """Train with the classes of the data; for songunet and dhariwal."""
    label_dropout: float = 0.1
    """Probability that an image is trained on without its class, as classifier-free guidance needs;
    0 in EDM's own runs."""

    sigma_begin: float = 0.0
    """Largest noise level; 0 derives it from the data (Technique 1)."""
    sigma_end: float = 0.01
    """Smallest noise level."""
    sigma_min: float = 0.0
    """Start of sigma(t), for the tutorials' networks."""
    sigma_max: float = 0.0
    """End of sigma(t), for the tutorials' networks."""
    n_sigmas: int = 0
    """Number of levels L; 0 derives it (Technique 2)."""
    overlap: float = 0.5
    """C of Technique 2."""
    epsilon: float = 0.0
    """Langevin step size; 0 derives it (Technique 4)."""
    n_steps_each: int = 5
    """Langevin steps per level, T."""
    langevin_form: Literal["code", "paper"] = "code"
    """code: x + a s + sqrt(2a) z, as published code runs; paper: half that a (2019 paper)."""

    batch_size: int = 64
    """Images per step."""
    steps: int = 2000
    """Optimiser steps of the whole run."""
    lr: float = 1e-3
    """Adam's learning rate."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay: bool = False
    """Cosine decay of the learning rate to 0 at the last step."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    ema: float = 0.999
    """Decay of the weights' moving average; 0 for none."""
    ema_halflife: tuple[float, ...] = ()
    """Half-lives of averages in images, as EDM has them, in place of `ema`; of several, the run is
    sampled by the one with the least loss of held-out images, else by the first."""
    ema_warmup: bool = True
    """Let the average forget its start: decay min(ema, (1 + n) / (10 + n)) at step n, or half-life
    at most 0.05 of the images seen. Off in the published NCSNv2 runs."""
    anneal_power: float = 2.0
    """p of the loss weight sigma^p."""
    grad_clip: float = 0.0
    """Clip the gradient to this norm; 0 for never."""
    autocast: Literal["none", "bf16"] = "none"
    """bf16 runs the network's convolutions in bfloat16; weights, norms and loss stay float32."""
    compile: bool = False
    """Compile the loss with torch.compile."""
    accumulate: int = 1
    """Micro-batches per step; less memory, the same training."""
    held_out: int = 0
    """Images held out from training, whose loss is logged at each snapshot."""
    max_minutes: float = 0.0
    """Stop, saved, after this many minutes; 0 for never."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads; 0 for torch's choice."""
    log_every: int = 20
    """Steps between two log entries."""
    snapshot_every: int = 500
    """Steps between two snapshots (checkpoint and sample grid)."""
    keep: int = 3
    """Number of checkpoints kept."""
    grid: int = 36
    """Samples drawn at each snapshot; 0 for none."""

    def __post_init__(self) -> None:
        make_plain(self)
        for field, low, high in _BOUNDS:
            value = getattr(self, field)
            if not low <= value < high:  # false for NaN
                bound = "" if high == math.inf else f" and below {high:g}"
                raise ValueError(
                    f"{field} must be at least {low:g}{bound}, and finite; got {value}"
                )
        limits.IMAGE_SIZE.check(self.image_size, "image_size")
        limits.STEPS.check(self.n_sigmas * self.n_steps_each, "n_sigmas x n_steps_each")
        for field, most in _MOST.items():
            if getattr(self, field) > most:
                raise ValueError(f"{field} must be at most {most}; got {getattr(self, field)}")
        check_positive("sigma_end", self.sigma_end)
        check_positive("lr", self.lr, LARGEST_STEP)
        check_positive("adam_eps", self.adam_eps, LARGEST_STEP)
        if self.sigma_begin and self.n_sigmas != 1 and self.sigma_begin <= self.sigma_end:
            raise ValueError(
                f"sigma_begin must be above sigma_end={self.sigma_end:g}; got {self.sigma_begin:g}"
            )
        if self.autocast not in ("none", "bf16"):
            raise ValueError(f"autocast must be none or bf16; got {self.autocast!r}")
        for halflife in self.ema_halflife:
            check_positive("ema_halflife", halflife)
        if len(set(self.ema_halflife)) < len(self.ema_halflife):
            raise ValueError(f"ema_halflife must not repeat; got {self.ema_halflife}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate must be at most batch_size={self.batch_size}; got {self.accumulate}"
            )
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain folder name; got {self.name!r}")
        parse_colour(self.background)
        if self.data == "digits" and self.channels != 1:
            raise ValueError("the digits are grey: channels must be 1, or data something else")
        self._check_network()

    def _check_network(self) -> None:
        """ValueError unless the network can be built."""
        style = {"act": self.act, "norm": self.norm}
        fits = style.items() <= TIME_STYLE.items()
        if self.class_cond and self.arch not in _CLASS_ARCHS:
            raise ValueError(
                f"class_cond needs a network with classes, arch {' or '.join(_CLASS_ARCHS)}: start "
                f"from --config edm-cifar10; got {self.arch!r}"
            )
        if self.arch in UNETS:
            if not fits:
                raise ValueError(
                    f"{self.arch} needs act 'swish' and norm 'GroupNorm': start from --config "
                    "cifar10-ncsnpp, cifar10-ddpmpp or edm-cifar10"
                )
            self.unet()
            return
        check_image_size(self.arch, self.image_size, self.image_size)
        if self.arch in TIME_ARCHS and not (fits and 0 < self.sigma_min < self.sigma_max):
            raise ValueError(
                f"{self.arch} needs act 'swish', norm 'GroupNorm' and 0 < sigma_min < "
                "sigma_max: start from --config mnist-sde, mnist-sde-b or mnist-sde-c"
            )

    def unet(self, n_classes: int = 0) -> UNetSettings:
        """Returns the hyperparameters of a U-Net of score_sde or EDM."""
        kind = UNETS[self.arch]
        own: tuple[str, ...] = EDM_PRECONDITIONINGS
        if issubclass(kind, (NCSNppConfig, DDPMConfig)):
            # Sigma is seen by Fourier features alone, which are NCSN++'s.
            own = SCORE_SDE_PRECONDITIONINGS[self.arch != "ncsnpp" :]
        if self.preconditioning not in own:
            raise ValueError(
                f"the preconditioning of {self.arch} must be one of {', '.join(own)}; got "
                f"{self.preconditioning!r}"
            )
        more: dict[str, Any] = {}
        if "centered" in kind.names():
            more["centered"] = self.preconditioning not in ("ve", "discrete_ve")
        if self.arch == "ncsnpp" and self.preconditioning != "ve":
            more["embedding_type"] = "positional"
        if n_classes:
            more["label_dim"] = n_classes
        if self.preconditioning == "iDDPMPrecond":
            more["out_channels"] = 2 * self.channels
        return kind.sized(
            self.image_size, self.channels, self.ngf, self.multiples, self.n_blocks,
            self.attention, self.dropout, **more,
        )  # fmt: skip

    def unet_config(self, n_classes: int = 0) -> UNetConfig:
        """Returns the configuration of a run's model that has a U-Net of score_sde or EDM."""
        from ncsn_fast.models.unet_config import preconditioned

        config = preconditioned(
            self.unet(n_classes),
            self.preconditioning,
            sigma_min=self.sigma_end,
            sigma_max=self.sigma_begin or 50.0,
            n=self.n_sigmas or 1000,
            n_steps_each=self.n_steps_each,
            epsilon=self.epsilon or None,
        )
        return dataclasses.replace(config, langevin_form=self.langevin_form)

    def model_config(self, *, sigma_begin: float, n_sigmas: int, epsilon: float) -> ModelConfig:
        """Returns the configuration of the run's model, with the noise levels filled in."""
        from ncsn_fast.models.score import ModelConfig

        return ModelConfig(
            arch=self.arch,
            image_size=(self.image_size, self.image_size),
            channels=self.channels,
            ngf=self.ngf,
            act=self.act,
            norm=self.norm,
            scale_input=self.arch not in TIME_ARCHS,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            n_sigmas=n_sigmas,
            sigma_begin=sigma_begin,
            sigma_end=self.sigma_end,
            epsilon=epsilon,
            n_steps_each=self.n_steps_each,
            langevin_form=self.langevin_form,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def _published(name: str, **settings: Any) -> TrainConfig:
    """Returns a published run: flips, Adam 1e-4, batch 128, EMA 0.999; or as set."""
    defaults: dict[str, Any] = {
        "data": "",
        "flip": True,
        "batch_size": 128,
        "lr": 1e-4,
        "warmup": 0,
        "ema_warmup": False,
        "snapshot_every": 5000,
        "log_every": 100,
        "workers": 4,
    }
    return TrainConfig(
        **{**defaults, **dataclasses.asdict(PUBLISHED_RUNS[name]), "name": name, **settings}
    )


def _ncsn(name: str, **settings: Any) -> TrainConfig:
    """Returns a published run of NCSN (2019)."""
    defaults = {"lr": 1e-3, "steps": 200_000, "ema": 0.0, "dequantise": True}
    return _published(name, **{**defaults, **settings})


def _tutorial(name: str) -> TrainConfig:
    """Returns a run of the score-SDE tutorial, on the digits unless data are given.

    Its 50 epochs of MNIST are 93 750 steps.
    """
    return _published(
        name, data="digits", flip=False, act="swish", norm="GroupNorm", batch_size=32,
        steps=10_000, ema=0.0, snapshot_every=1000, workers=0,
    )  # fmt: skip


def _unet(name: str, **settings: Any) -> TrainConfig:
    """Returns a published run of score_sde: flips, Adam 2e-4, batch 128, gradients of norm 1."""
    defaults: dict[str, Any] = {
        "data": "", "image_size": 32, "channels": 3, "flip": True, "workers": 4, "act": "swish",
        "norm": "GroupNorm", "ngf": 128, "batch_size": 128, "steps": 1_300_000, "lr": 2e-4,
        "warmup": 5000, "grad_clip": 1.0, "n_steps_each": 1, "n_sigmas": 1000,
        "snapshot_every": 5000, "log_every": 100,
    }  # fmt: skip
    return TrainConfig(**{**defaults, "name": name, **settings})


CONFIGS: dict[str, TrainConfig] = {
    "digits": TrainConfig(),
    "mnist": TrainConfig(
        "mnist",
        data="",
        image_size=28,
        ngf=32,
        steps=200_000,
        autocast="bf16",
        held_out=1000,
        ema_halflife=(20_000.0, 100_000.0, 500_000.0),
    ),
    "cifar10": _published("cifar10", steps=300_000),
    "celeba": _published("celeba", centre_crop=140, steps=210_000),
    "church": _published("church", steps=200_000),
    "bedroom": _published("bedroom", batch_size=64, steps=150_000),
    "tower": _published("tower", batch_size=64, steps=150_000),
    "ffhq": _published("ffhq", adam_eps=1e-3, batch_size=32, steps=80_000),
    "ncsn-cifar10": _ncsn("ncsn-cifar10"),
    "ncsn-celeba": _ncsn("ncsn-celeba", centre_crop=140),
    "ncsn-mnist": _ncsn("ncsn-mnist", flip=False),
    "mnist-sde": _tutorial("mnist-sde"),
    "mnist-sde-b": _tutorial("mnist-sde-b"),
    "mnist-sde-c": _tutorial("mnist-sde-c"),
    "cifar10-ncsnpp": _unet("cifar10-ncsnpp", arch="ncsnpp", sigma_begin=50.0),
    "cifar10-ddpmpp": _unet("cifar10-ddpmpp", arch="ddpmpp", preconditioning="vp", ema=0.9999),
    # Karras et al. 2022, table 7, without augmentation: 200 million images, 10 of them of warm-up.
    "edm-cifar10": _unet(
        "edm-cifar10",
        arch="songunet",
        preconditioning="EDMPrecond",
        multiples=(2, 2, 2),
        dropout=0.13,
        batch_size=512,
        steps=390_625,
        lr=1e-3,
        warmup=19_531,
        grad_clip=0.0,
        ema_halflife=(500_000.0,),
        n_sigmas=0,
    ),
}


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    """Command-line options of `python -m ncsn_fast.train --config toy`."""

    config: Literal["toy"] = "toy"
    """The two-dimensional toy; the other configurations train on images."""
    name: str = "toy"
    """Run name; the run is written to <runs>/<name>."""
    runs: str = "runs"
    """Folder that holds the runs."""
    objective: Literal["sliced", "sliced-vr", "implicit", "denoising"] = "sliced"
    """Score matching objective; sliced-vr is its variance-reduced form."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 256
    """Draws from the mixture per step."""
    lr: float = 5e-3
    """Adam's learning rate at first; it falls to 0 as a cosine."""
    width: int = 128
    """Width of the network."""
    n: int = 1280
    """Samples of each kind to draw."""
    seed: int = 0
    """Seed of initial weights, data and samplers."""
    dry_run: Annotated[bool, _ONE_FLAG] = False
    """Print the options as JSON and stop."""

    def __post_init__(self) -> None:
        make_plain(self)
        bounds = {"steps": 2**53, "batch_size": 2**31, "width": 2**16, "n": 2**31}
        for field, most in bounds.items():
            value = getattr(self, field)
            if not 1 <= value <= most:
                bound = "at least 1" if value < 1 else f"at most {most}"
                raise ValueError(f"{field} must be {bound}; got {value}")
        check_positive("lr", self.lr, LARGEST_STEP)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32); got {self.seed}")
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain folder name; got {self.name!r}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
