"""All networks of NCSN (2019) and NCSNv2 (2020), built from a table of stages (architectures.py).

A network maps data x in [0, 1] to f(x, level). In NCSNv2 f = sigma * score, and the caller divides
by sigma (Technique 3); in NCSN f is the score itself (models/score.py).
"""

from __future__ import annotations

from torch import Tensor, nn

from ncsn_fast.models.architectures import ARCHITECTURES
from ncsn_fast.models.layers import RefineBlock, ResidualBlock, Style, check_images, conv3x3


class RefineNet(nn.Module):
    """Network of the NCSN family.

    Args:
        arch: a key of ARCHITECTURES.
        channels: image channels.   ngf: width of the first stage.
        n_levels: number of noise levels (for the embeddings of conditional networks).
        act, norm: names in models/layers.py.
        scale_input: compute 2x - 1 first, for data in [0, 1]; off for `rescaled` or
            logit-transformed data.
    """

    def __init__(
        self,
        arch: str,
        *,
        channels: int,
        ngf: int,
        n_levels: int,
        act: str = "elu",
        norm: str = "InstanceNorm++",
        scale_input: bool = True,
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
        if min(channels, ngf, n_levels) < 1:
            raise ValueError(
                f"channels, ngf and n_levels must be positive; got {channels}, {ngf} and {n_levels}"
            )
        self.arch, self.scale_input = ARCHITECTURES[arch], scale_input
        self.channels = channels
        self.style = Style(act, norm, n_levels if self.arch.conditional else 0)
        self.begin_conv = conv3x3(channels, ngf)
        self.normalizer = self.style.norm(ngf)
        self.end_conv = conv3x3(ngf, channels)
        self._add_stages(ngf)
        self._add_refines(ngf)

    def _add_stages(self, ngf: int) -> None:
        width = ngf
        for stage in self.arch.stages:
            cout = stage.width * ngf
            first = ResidualBlock(width, cout, self.style, down=stage.down, dilation=stage.dilation)
            second = ResidualBlock(cout, cout, self.style, dilation=stage.dilation)
            self.add_module(stage.name, nn.ModuleList((first, second)))
            width = cout

    def _add_refines(self, ngf: int) -> None:
        widths = {stage.name: stage.width * ngf for stage in self.arch.stages}
        blocks: dict[str, RefineBlock] = {}
        lower: list[int] = []
        for refine in self.arch.refines:
            end = refine is self.arch.refines[-1]
            blocks[refine.name] = RefineBlock(
                [widths[refine.skip], *lower], refine.width * ngf, self.style, end=end
            )
            lower = [refine.width * ngf]
        # Optimiser states index parameters in the published order: refine31 after refine3.
        for name in sorted(blocks):
            self.add_module(name, blocks[name])

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x is (N, channels, H, W) with an admissible H and W."""
        check_images(x, self.channels, self.arch.size_multiple)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Computes f(x, level), shape of x; only conditional networks read `level` (N,) int64."""
        self.check_input(x)
        if self.arch.conditional and level is None:
            raise ValueError(
                "this network is conditioned on the noise level: pass level (N,), or use "
                "ScoreModel.score(x, sigma)"
            )
        h = self.begin_conv(2 * x - 1 if self.scale_input else x)
        skips: dict[str, Tensor] = {}
        for stage in self.arch.stages:
            for block in self.get_submodule(stage.name).children():
                h = block(h, level)
            skips[stage.name] = h
        refined: list[Tensor] = []
        for refine in self.arch.refines:
            refined = [self.get_submodule(refine.name)([skips[refine.skip], *refined], level)]
        return self.end_conv(self.style.norm_act(self.normalizer, refined[0], level))
