"""Published baseline: the networks and the sampling loop as the authors' eager PyTorch runs them.

Written for this project from the papers and `ncsn_fast.models`. Every operation is separate, in
float32 and NCHW, as in the released code: nothing is fused, nothing is left out. The convolutions
are those of a copy of the given model, so outputs can be compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn_fast import ScoreModel
from ncsn_fast.samplers.program import Program


def instance_norm_plus(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Computes IN++ (instance norm plus standardised means), each product and sum separately."""
    means = torch.mean(x, dim=(2, 3))
    centre = torch.mean(means, dim=-1, keepdim=True)
    spread = torch.var(means, dim=-1, keepdim=True)
    means = (means - centre) / torch.sqrt(spread + 1e-5)
    h = F.instance_norm(x) + means[..., None, None] * alpha[..., None, None]
    return gamma.view(1, -1, 1, 1) * h + beta.view(1, -1, 1, 1)


class Plain(nn.Module):
    """Unconditional network in plain PyTorch operations, without the inefficiencies of `Published`.

    Input of compilers and third-party runtimes: f(x) of the model, x (N, C, H, W) in [0, 1]. Its
    normalisation is the published formula, whose `instance_norm` they can fuse.
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        if model.conditional or model.config.act != "elu" or not model.config.scale_input:
            raise ValueError(f"only NCSNv2 networks with ELU are written here; got {model.config}")
        self.net = copy.deepcopy(model.net)
        self.sigmas: Tensor
        self.register_buffer("sigmas", model.sigmas.clone())

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        h = net.begin_conv(2 * x - 1)
        skips: dict[str, Tensor] = {}
        for stage in net.arch.stages:
            for block in getattr(net, stage.name):
                h = self.residual(block, h)
            skips[stage.name] = h
        refined: list[Tensor] = []
        for refine in net.arch.refines:
            refined = [self.refine(getattr(net, refine.name), [skips[refine.skip], *refined])]
        return net.end_conv(F.elu(self.norm(net.normalizer, refined[0])))

    def norm(self, p: Any, x: Tensor) -> Tensor:
        return instance_norm_plus(x, p.alpha, p.gamma, p.beta)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        h = block.conv1(F.elu(self.norm(block.normalize1, x)))
        h = self.convolve(block.conv2, F.elu(self.norm(block.normalize2, h)))
        return (x if block.shortcut is None else self.convolve(block.shortcut, x)) + h

    def convolve(self, module: Any, x: Tensor) -> Tensor:
        """Applies a convolution, with the mean of 2x2 squares if the model has one."""
        if isinstance(module, nn.Conv2d):
            return module(x)
        return self.mean_pool(module.conv(x))

    def mean_pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    def units(self, block: Any, x: Tensor) -> Tensor:
        """Applies an RCU: in pairs, ELU and convolution, then the sum with the pair's input."""
        for b in range(block.n_blocks):
            residual = x
            for s in range(block.N_STAGES):
                x = getattr(block, f"{b + 1}_{s + 1}_conv")(F.elu(x))
            x = x + residual
        return x

    def pools(self, block: Any, x: Tensor) -> Tensor:
        """Applies a CRP: a chain of max pools and convolutions, summed."""
        x = F.elu(x)
        path = x
        for conv in block.convs:
            path = conv(F.max_pool2d(path, 5, stride=1, padding=2))
            x = path + x
        return x

    def fuse(self, block: Any, xs: list[Tensor]) -> Tensor:
        """Applies an MSF: the sum of the convolved inputs at the size of the first."""
        skip, lower = (conv(x) for conv, x in zip(block.convs, xs, strict=True))
        if lower.shape[2:] != skip.shape[2:]:
            lower = F.interpolate(lower, size=skip.shape[2:], mode="bilinear", align_corners=True)
        return skip + lower

    def refine(self, block: Any, xs: list[Tensor]) -> Tensor:
        hs = [self.units(unit, x) for unit, x in zip(block.adapt_convs, xs, strict=True)]
        h = self.fuse(block.msf, hs) if len(hs) > 1 else hs[0]
        return self.units(block.output_convs, self.pools(block.crp, h))


class Published(Plain):
    """Baseline with exactly the operations that the released code executes.

    Unlike `Plain`, it computes a mean pool by four strided sums, and its fusion starts from zeros
    and resizes every input, even those that have the right size.
    """

    def mean_pool(self, x: Tensor) -> Tensor:
        corners = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return sum(corners) / 4.0  # type: ignore[return-value]

    def fuse(self, block: Any, xs: list[Tensor]) -> Tensor:
        size = xs[0].shape[2:]
        total = xs[0].new_zeros(len(xs[0]), block.convs[0].out_channels, *size)
        for conv, x in zip(block.convs, xs, strict=True):
            total += F.interpolate(conv(x), size=size, mode="bilinear", align_corners=True)
        return total

    def score_at(self, x: Tensor, level: Tensor) -> Tensor:
        """Computes f / sigma, as the released networks do."""
        return self(x) / self.sigmas[level].view(-1, 1, 1, 1)


def sample(
    network: Published,
    program: Program,
    x: Tensor,
    draw: Callable[[Tensor, int], Tensor] = lambda x, k: torch.randn_like(x),
) -> Tensor:
    """Runs the released sampling loop on a program and returns images in [0, 1].

    Every step computes the norms that it could print, updates by separate operations, and keeps a
    copy of the state.

    Args:
        program: its columns sigma, b and c; a row without noise (c = 0) is a denoising step.
        x: initial state.   draw: (state, step) -> standard normals of its shape.
    """
    kept = []
    with torch.no_grad():
        for k in range(program.nfe):
            x = step(network, program, x, k, draw)
            kept.append(x.to("cpu"))
    return kept[-1].clamp(0.0, 1.0)


def step(
    network: Published,
    program: Program,
    x: Tensor,
    k: int,
    draw: Callable[[Tensor, int], Tensor] = lambda x, k: torch.randn_like(x),
) -> Tensor:
    """Runs row k of a program like the released loop, without the copy that it may keep."""
    level = min(int(program.level[k]), len(network.sigmas) - 1)
    score = network.score_at(x, torch.full((len(x),), level, device=x.device))
    size, scale = float(program.b[k] * program.sigma[k]), float(program.c[k])
    if scale == 0:
        return x + size * score
    noise = draw(x, k)
    x = x + size * score + noise * scale
    _norms(x, score, noise, size, float(program.sigma[k]))
    return x


def _norms(x: Tensor, score: Tensor, noise: Tensor, step: float, sigma: float) -> list[Tensor]:
    """Computes the norms of score, noise, state and mean score, and the signal-to-noise ratio."""
    score_norm, noise_norm, image_norm = (
        torch.norm(t.reshape(len(t), -1), dim=-1).mean() for t in (score, noise, x)
    )
    ratio = math.sqrt(step / 2) * score_norm / noise_norm
    mean_norm = torch.norm(score.mean(dim=0).reshape(-1)) ** 2 * sigma**2
    return [score_norm, noise_norm, image_norm, ratio, mean_norm]
