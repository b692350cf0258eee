"""Noise levels of a run: what its configuration leaves open, from the data (Techniques 1, 2, 4)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data import datasets
from ncsn_fast.data.loader import labels_of
from ncsn_fast.diffusion import schedule
from ncsn_fast.models.architectures import TIME_ARCHS
from ncsn_fast.models.score import ModelConfig
from ncsn_fast.models.unet import Clock
from ncsn_fast.models.unet_architectures import UNETS
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.training.configs import TrainConfig

log = logging.getLogger("ncsn_fast.train")


def resolve_ladder(
    config: TrainConfig, images: datasets.Images, *, progress: bool = False
) -> ModelConfig | UNetConfig:
    """Returns the model's configuration; Techniques 1, 2 and 4 derive what `config` leaves open.

    U-Nets of score_sde and EDM have the published noise levels unless `config` gives others.

    Raises:
        ValueError: the images are too few, or equal.
    """
    if config.arch in UNETS:
        return config.unet_config(n_classes(config, images))
    sigma_begin, n = config.sigma_begin, config.n_sigmas
    if sigma_begin <= 0 and config.arch in TIME_ARCHS:
        clock = Clock(TIME_ARCHS[config.arch], config.sigma_min, config.sigma_max)
        sigma_begin = float(clock.std(1.0))
    elif sigma_begin <= 0:
        sigma_begin = largest_distance(config, images, progress=progress)
    dim = config.channels * config.image_size**2
    if n <= 0:
        n = schedule.n_levels(sigma_begin, config.sigma_end, dim, config.overlap)
    ladder = schedule.geometric(sigma_begin, config.sigma_end, n)
    # Technique 4 uses the step size of the code; the paper's form of the step halves it.
    form = 2 if config.langevin_form == "paper" else 1
    epsilon = config.epsilon or form * schedule.epsilon_for(ladder, config.n_steps_each)
    log.info(
        "ladder: sigma %.4g -> %.4g in %d levels, T = %d, epsilon = %.4g",
        sigma_begin, config.sigma_end, n, config.n_steps_each, epsilon,
    )  # fmt: skip
    return config.model_config(sigma_begin=sigma_begin, n_sigmas=n, epsilon=epsilon)


def n_classes(config: TrainConfig, images: datasets.Images) -> int:
    """Returns the number of classes of the network to train; 0 for one without.

    Raises:
        DataError: the network has classes, and the images have no labels, or others.
    """
    if not config.class_cond:
        return 0
    labels, n = labels_of(images), len(images.classes)
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if not 0 <= low <= high < n:
        raise datasets.DataError(
            f"the labels must be numbers of the {n} classes that the data names; got {low} to "
            f"{high}: mend the labels, or the list of classes"
        )
    return n


def largest_distance(config: TrainConfig, images: datasets.Images, *, progress: bool) -> float:
    """Returns Technique 1's sigma_begin, and logs how many images it comes from."""
    n, dim = len(images), config.channels * config.image_size**2
    chosen = schedule.compared_images(n, dim, config.seed)
    indices = range(n) if chosen is None else chosen.tolist()
    distance = schedule.max_pairwise_distance(_read(images, indices, progress), progress=progress)
    if chosen is not None:
        log.info(
            "sigma_begin is the largest distance among %d of the %d images, chosen at random: with "
            "95 %% confidence, at most %.2g %% of all pairs are further apart; --sigma-begin sets "
            "another",
            len(indices), n, 100 * schedule.missed_share(len(indices)),
        )  # fmt: skip
    return schedule.check_distance(distance, config.sigma_end)


def _read(images: datasets.Images, indices: list[int] | range, progress: bool) -> Tensor:
    if isinstance(images, datasets.MemoryImages):
        return datasets.stack(images, list(indices))
    bar = tqdm(indices, desc="reading images", unit="image", delay=1, disable=not progress)
    return torch.stack([images[i] for i in bar])
