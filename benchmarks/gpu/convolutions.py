"""The network's 3x3 convolutions in cuDNN: a lower bound of the network's time."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from race import Entrant, relative_error

from gpu.section import Section

SHAPES = {"256 channels, 16x16": (256, 256, 16, 16), "128 channels, 32x32": (256, 128, 32, 32)}
DILATIONS = (1, 2, 4)


def measure(section: Section) -> None:
    """Times bfloat16, channels-last, 256 images, equal channels in and out.

    Dilations interleaved.
    """
    names = [f"dilation {d}" for d in DILATIONS]
    section.plan([(title, names) for title in SHAPES])
    for title, shape in SHAPES.items():
        n, c, height, width = (2, 8, 8, 8) if section.small else shape
        builders = {
            name: functools.partial(_enter, section, (n, c, height, width), d)
            for name, d in zip(names, DILATIONS, strict=True)
        }
        flop = 2 * 9 * c * c * n * height * width
        section.race(title, builders, seconds=2.0, flop=flop, batch=n)


def _enter(section: Section, shape: tuple[int, ...], dilation: int) -> Entrant:
    c, last = shape[1], torch.channels_last
    x = torch.randn(shape, device=section.device).bfloat16().contiguous(memory_format=last)
    weight = torch.randn(c, c, 3, 3, device=section.device).div(3 * c**0.5).bfloat16()
    weight = weight.contiguous(memory_format=last)

    def call() -> torch.Tensor:
        return F.conv2d(x, weight, padding=dilation, dilation=dilation)

    def error() -> float:
        exact = F.conv2d(x[:2].double(), weight.double(), padding=dilation, dilation=dilation)
        return relative_error(call()[:2], exact)

    with torch.no_grad():  # before torch 2.11, graphs captured in inference mode break other graphs
        run, calls = section.lap_of([call])
    return Entrant(run, error, 1e-2, {"calls": calls})
