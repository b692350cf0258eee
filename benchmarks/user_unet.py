"""A network that users bring, for benchmarks: the U-Net of DDPM on CIFAR-10, from diffusers.

UNet2DModel in the size of google/ddpm-cifar10-32 (35.7 M parameters) with random weights.
"""

from __future__ import annotations

import functools

import torch
from race import Absent
from torch import nn

import ncsn_fast
from ncsn_fast import ScoreModel
from ncsn_fast.diffusion.parameterisation import DiscreteVP


def network(small: bool) -> nn.Module:
    """Returns the network; a tiny one for tests."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise Absent(f"package diffusers cannot be imported: {error}") from error
    widths, layers = ((8, 16, 16, 16), 1) if small else ((128, 256, 256, 256), 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=8 if small else 32, block_out_channels=widths, layers_per_block=layers,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_eps=1e-6, norm_num_groups=4 if small else 32, downsample_padding=0,
            flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        )  # fmt: skip
    made: nn.Module = net.requires_grad_(False)
    return made


def wrapped(net: nn.Module, small: bool) -> ScoreModel:
    """Returns a network of this kind as a model."""
    size = 8 if small else 32
    return ncsn_fast.wrap(
        net, predicts="epsilon", sees="timestep", process=DiscreteVP(), image_shape=(3, size, size),
        data_range=(-1, 1),
    )  # fmt: skip


@functools.cache
def model(small: bool) -> ScoreModel:
    """Returns the wrapped network."""
    return wrapped(network(small), small)
