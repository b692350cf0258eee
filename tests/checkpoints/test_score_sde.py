"""Checkpoints of score_sde_pytorch: the golden networks, written as its trainer writes them."""

import logging

import golden
import pytest
import torch

import ncsn_fast
from ncsn_fast import CheckpointError, convert
from ncsn_fast.checkpoints import score_sde
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.score_unet import build
from ncsn_fast.models.unet_architectures import DDPMConfig, DDPMppConfig, NCSNppConfig
from tutorial import weight as sde_weight

TINY = {"nf": 16, "num_res_blocks": 1, "image_size": 16, "attn_resolutions": (8,),
        "ch_mult": (1, 2, 2)}  # fmt: skip
# Golden file -> its network, and the published run that has its SDE.
GOLDEN = {
    "ncsnpp_cont_16": (NCSNppConfig(**TINY), "cifar10_ncsnpp_continuous"),
    "ncsnpp_discrete_16": (NCSNppConfig(**TINY, embedding_type="positional"), "cifar10_ncsnpp"),
    "ncsnpp_ffhq_style_16": (
        NCSNppConfig(**TINY, progressive="output_skip", progressive_input="input_skip"),
        "ffhq_256_ncsnpp_continuous",
    ),
    "ddpmpp_cont_16": (DDPMppConfig(**TINY), "vp_cifar10_ddpmpp_continuous"),
    "ddpm_16": (DDPMConfig(**{**TINY, "nf": 32}), "vp_ddpm_cifar10_continuous"),
}  # fmt: skip
names = pytest.mark.parametrize("name", GOLDEN)


def weight(key, shape):
    """A weight by the golden files' recipe, which reads NIN's matrices the other way round."""
    drawn = sde_weight(key, shape)
    if key.endswith(".W") and len(shape) == 2:
        drawn = drawn / 2 * (shape[1] / shape[0]) ** 0.5
    return drawn
