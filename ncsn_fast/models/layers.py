"""Building blocks of the NCSN family: IN++, residual blocks, the parts of a RefineNet block.

Attribute names match the keys of the published checkpoints. Every block takes `level`: the noise
level index of each sample, (N,) int64, for the conditional networks of NCSN (2019), else None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn_fast import ops

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": functools.partial(ops.activation, name="elu"),
    "relu": F.relu,
    "lrelu": functools.partial(F.leaky_relu, negative_slope=0.2),
    "swish": functools.partial(ops.activation, name="silu"),
}


class InstanceNormPlus(nn.Module):
    """IN++ with one set of parameters (`n_levels` 0), or one per noise level (an embedding)."""

    def __init__(self, channels: int, n_levels: int = 0) -> None:
        super().__init__()
        if n_levels:
            self.embed = nn.Embedding(n_levels, 3 * channels)
            nn.init.normal_(self.embed.weight[:, : 2 * channels], 1.0, 0.02)
            nn.init.zeros_(self.embed.weight[:, 2 * channels :])
        else:
            self.alpha = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
            self.gamma = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
            self.beta = nn.Parameter(torch.zeros(channels))
        self.conditional = n_levels > 0

    def parameters_at(self, level: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (alpha, gamma, beta), each (C,), or (N, C) if conditional."""
        if not self.conditional:
            return self.alpha, self.gamma, self.beta
        gamma, alpha, beta = self.embed(level).chunk(3, dim=1)
        return alpha, gamma, beta

    def forward(self, x: Tensor, level: Tensor | None = None, *, elu: bool = False) -> Tensor:
        return ops.instance_norm_plus(x, *self.parameters_at(level), elu=elu)


class VarianceNorm(nn.Module):
    """Variance norm of published ablations: alpha x / sqrt(unbiased variance over H, W + 1e-5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        variance = torch.var(h, dim=(2, 3), keepdim=True)
        return (h * torch.rsqrt(variance + 1e-5) * self.alpha[:, None, None]).to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "InstanceNorm++": InstanceNormPlus,
    "InstanceNorm": nn.InstanceNorm2d,
    "VarianceNorm": VarianceNorm,
    "BatchNorm": nn.BatchNorm2d,
    "NoneNorm": lambda channels: nn.Identity(),
}


class Style:
    """Settings shared by a network's blocks: activation, norm, conditioning and the CRP's pool.

    Args:
        act: a key of ACTIVATIONS.   norm: a key of NORMS.
        n_levels: number of noise levels the norms are conditioned on; 0 for unconditional networks.
    """

    def __init__(self, act: str, norm: str, n_levels: int = 0) -> None:
        for name, table, value in (("act", ACTIVATIONS, act), ("norm", NORMS, norm)):
            if value not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}; got {value!r}")
        if n_levels and norm != "InstanceNorm++":
            raise ValueError(
                f"networks conditioned on the level need norm 'InstanceNorm++'; got {norm!r}"
            )
        self.act_name, self.norm_name, self.n_levels = act, norm, n_levels
        self.act = ACTIVATIONS[act]

    def norm(self, channels: int) -> nn.Module:
        if self.n_levels:
            return InstanceNormPlus(channels, self.n_levels)
        return NORMS[self.norm_name](channels)

    def norm_act(self, norm: nn.Module, x: Tensor, level: Tensor | None) -> Tensor:
        """Computes act(norm(x)), as one fused op for IN++ with ELU."""
        if isinstance(norm, InstanceNormPlus):
            if self.act_name == "elu":
                return norm(x, level, elu=True)
            return self.act(norm(x, level))
        return self.act(norm(x))

    def pool5(self, x: Tensor) -> Tensor:
        """Applies the 5x5 pool, stride 1, padding 2.

        Average with zeros counted if conditional, else maximum.
        """
        if self.n_levels:
            return F.avg_pool2d(x, 5, stride=1, padding=2)
        return F.max_pool2d(x, 5, stride=1, padding=2)


def conv3x3(cin: int, cout: int, *, bias: bool = True, dilation: int = 1) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps the image size."""
    return nn.Conv2d(cin, cout, 3, padding=dilation, dilation=dilation, bias=bias)


class ConvMeanPool(nn.Module):
    """Convolution, then the mean of each 2x2 square."""

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2)


class ResidualBlock(nn.Module):
    """Residual block: norm, act, conv1, norm, act, conv2, plus a shortcut of the raw input.

    `down` halves the resolution, or, with a dilation above 1, keeps it and dilates instead.
    """

    def __init__(
        self, cin: int, cout: int, style: Style, *, down: bool = False, dilation: int = 1
    ) -> None:
        super().__init__()
        self.style = style
        middle = cin if down else cout
        halve = down and dilation == 1
        self.conv1 = conv3x3(cin, middle, dilation=dilation)
        self.normalize2 = style.norm(middle)
        self.conv2 = (
            ConvMeanPool(middle, cout, 3) if halve else conv3x3(middle, cout, dilation=dilation)
        )
        self.shortcut: nn.Module | None = None
        if halve:
            self.shortcut = ConvMeanPool(cin, cout, 1)
        elif down or cin != cout:
            self.shortcut = (
                conv3x3(cin, cout, dilation=dilation) if dilation > 1 else nn.Conv2d(cin, cout, 1)
            )
        self.normalize1 = style.norm(cin)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        h = self.conv1(self.style.norm_act(self.normalize1, x, level))
        h = self.conv2(self.style.norm_act(self.normalize2, h, level))
        return h + (x if self.shortcut is None else self.shortcut(x))


class ResidualConvUnit(nn.Module):
    """RCU: per block x + conv(act(conv(act(x)))), without bias; norms first if conditional."""

    N_STAGES = 2

    def __init__(self, channels: int, n_blocks: int, style: Style) -> None:
        super().__init__()
        self.style, self.n_blocks = style, n_blocks
        for name in self._stage_names():
            if style.n_levels:
                self.add_module(f"{name}_norm", style.norm(channels))
            self.add_module(f"{name}_conv", conv3x3(channels, channels, bias=False))

    def _stage_names(self) -> list[str]:
        return [f"{b + 1}_{s + 1}" for b in range(self.n_blocks) for s in range(self.N_STAGES)]

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        for i, name in enumerate(self._stage_names()):
            if i % self.N_STAGES == 0:
                residual = x
            if self.style.n_levels:
                x = self.style.norm_act(self.get_submodule(f"{name}_norm"), x, level)
            else:
                x = self.style.act(x)
            x = self.get_submodule(f"{name}_conv")(x)
            if i % self.N_STAGES == self.N_STAGES - 1:
                x = x + residual
        return x


class ChainedResidualPool(nn.Module):
    """CRP: x = act(x), then twice path = conv(pool5(path)), x = x + path.

    Conditional networks normalise before the pool.
    """

    N_STAGES = 2

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.style = style
        self.convs = nn.ModuleList(
            conv3x3(channels, channels, bias=False) for _ in range(self.N_STAGES)
        )
        if style.n_levels:
            self.norms = nn.ModuleList(style.norm(channels) for _ in range(self.N_STAGES))

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        x = self.style.act(x)
        path = x
        for stage, conv in enumerate(self.convs):
            if self.style.n_levels:
                path = self.norms[stage](path, level)
            path = conv(self.style.pool5(path))
            x = x + path
        return x


class MultiScaleFusion(nn.Module):
    """MSF: sums a 3x3 convolution of every input, each resized to the first's size.

    Resizing is bilinear with align_corners; conditional networks normalise before the convolution.
    """

    def __init__(self, cins: list[int], cout: int, style: Style) -> None:
        super().__init__()
        self.style = style
        self.convs = nn.ModuleList(conv3x3(cin, cout) for cin in cins)
        if style.n_levels:
            self.norms = nn.ModuleList(style.norm(cin) for cin in cins)

    def forward(self, xs: list[Tensor], level: Tensor | None = None) -> Tensor:
        size = xs[0].shape[2:]
        total: Tensor | None = None
        for i, (x, conv) in enumerate(zip(xs, self.convs, strict=True)):
            h = conv(self.norms[i](x, level) if self.style.n_levels else x)
            if h.shape[2:] != size:
                h = F.interpolate(h, size=size, mode="bilinear", align_corners=True)
            total = h if total is None else total + h
        assert total is not None
        return total


class RefineBlock(nn.Module):
    """RefineNet block: an RCU per input, an MSF (for several inputs), a CRP, an output RCU."""

    def __init__(self, cins: list[int], cout: int, style: Style, *, end: bool = False) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ResidualConvUnit(cin, 2, style) for cin in cins)
        self.output_convs = ResidualConvUnit(cout, 3 if end else 1, style)
        if len(cins) > 1:
            self.msf = MultiScaleFusion(cins, cout, style)
        self.crp = ChainedResidualPool(cout, style)

    def forward(self, xs: list[Tensor], level: Tensor | None = None) -> Tensor:
        hs = [adapt(x, level) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        h = self.msf(hs, level) if len(hs) > 1 else hs[0]
        return self.output_convs(self.crp(h, level), level)


def check_images(x: Tensor, channels: int, multiple: int) -> None:
    """Raises ValueError unless x is (N, channels, H, W), with H and W multiples of a number."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"expected images (N, {channels}, H, W); got {tuple(x.shape)}")
    if x.shape[2] % multiple or x.shape[3] % multiple or 0 in x.shape[2:]:
        raise ValueError(
            f"this network takes images whose height and width are multiples of {multiple}; "
            f"got {x.shape[2]}x{x.shape[3]}. Resize or pad them."
        )
