"""The published training runs: networks, noise levels and Langevin steps, in one table.

Checkpoints that hold no configuration are completed from it, and training starts from it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A published network, its noise levels and its sampling settings.

    Attributes:
        arch, channels, ngf, image_size: the network, and the height and width of its images.
        sigma_begin, n_sigmas: the largest noise level, and the number of levels; the last is 0.01.
        epsilon, n_steps_each: step size and steps per level of annealed Langevin dynamics.
        sigma_min, sigma_max: ends of sigma(t), for networks that see the time.
    """

    arch: str
    image_size: int
    sigma_begin: float
    n_sigmas: int
    epsilon: float
    n_steps_each: int = 5
    channels: int = 3
    ngf: int = 128
    sigma_min: float = 0.0
    sigma_max: float = 0.0


_LSUN_128 = PublishedRun("ncsnv2_deeper", 128, 190.0, 1086, 1.8e-6, 3)
_TUTORIAL_B = PublishedRun(
    "unet_b", 28, 9.84521, 88, 1.1e-5, channels=1, ngf=32, sigma_min=1.0, sigma_max=25.0
)
_NCSN = PublishedRun("ncsn", 32, 1.0, 10, 2e-5, 100)

PUBLISHED_RUNS: dict[str, PublishedRun] = {
    "cifar10": PublishedRun("ncsnv2", 32, 50.0, 232, 6.2e-6),
    "celeba": PublishedRun("ncsnv2", 64, 90.0, 500, 3.3e-6),
    "church": PublishedRun("ncsnv2_deeper", 96, 140.0, 788, 4.9e-6, 4),
    "bedroom": _LSUN_128,
    "tower": _LSUN_128,
    "ffhq": PublishedRun("ncsnv2_deepest", 256, 348.0, 2311, 9e-7, 3),
    "ncsn-cifar10": _NCSN,
    "ncsn-celeba": _NCSN,
    "ncsn-mnist": dataclasses.replace(_NCSN, image_size=28, channels=1, ngf=64),
    "mnist-sde": PublishedRun(
        "unet_a", 28, 22.0, 99, 1.1e-5, channels=1, ngf=32, sigma_min=0.01, sigma_max=22.0
    ),
    "mnist-sde-b": _TUTORIAL_B,
    "mnist-sde-c": dataclasses.replace(_TUTORIAL_B, arch="unet_c"),
}
