"""Smallest Sampler, and how tests draw with it."""

import dataclasses

import torch

from ncsn_fast import ModelConfig, ScoreModel

TINY = ModelConfig(
    image_size=(8, 8), ngf=2, n_sigmas=4, sigma_begin=2.0, sigma_end=0.1, epsilon=1e-3,
    n_steps_each=2,
)  # fmt: skip

NFE = 4 * 2 + 1

CLOSE = {"rtol": 0.0, "atol": 1e-4}  # allows for rounding accumulated over NFE evaluations


def tiny(**fields):
    """Returns a model with torch's initial weights."""
    torch.manual_seed(0)
    return ScoreModel(dataclasses.replace(TINY, **fields))


def draw(sampler, n=1, **options):
    """Draws samples without a progress bar."""
    return sampler.sample(n, progress=False, **options)


def photos(n=2, channels=3, seed=0):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
