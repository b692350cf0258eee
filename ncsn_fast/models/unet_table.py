"""Table of the rows that the U-Nets of score_sde and EDM consist of.

All five are one U-Net (Ho et al. 2020; Dhariwal and Nichol 2021; Song et al. 2021; Karras et al.
2022), and `table` lists its rows in the order they run. With levels of resolution R, R/2, ... :

    encoder   a convolution; at each level its blocks, then a block that halves the resolution, and,
              with an input pyramid, the halved image, which joins the features
    decoder   two blocks at the coarsest level; at each level its blocks, one more than in the
              encoder, each of which takes an encoder output besides; with an output pyramid an
              output, added to the doubled one of the level below; a block that doubles the
              resolution; the output at the finest level

What differs is in a Shape (how many rows, how wide), a Style (how a block computes) and an
Embedding (of the noise level); unet_architectures.py has those of each network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Resampling = Literal["", "down", "up"]
Kind = Literal["conv", "block", "resample", "pyramid", "output"]
Pyramid = Literal["", "skip", "residual"]


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of a U-Net's table.

    Attributes:
        kind: of its modules. "conv": 3x3 convolution of the image; "block": residual block;
            "resample": convolution that halves or doubles the resolution; "pyramid": the halved
            image, which joins the features; "output": norm, activation and 3x3 convolution.
        role: within its level: "conv", "block0", "down", "up", "in0", "in1", "aux".
        decoder: whether it is of the decoder.
        resolution: of its output.
        cin, cout: its channels, without those of `skip`.
        skip: channels of the encoder's output that a block takes besides; 0 for none.
        pyramid: how the image joins the features, in a row "pyramid".
        resample: how it changes the resolution; of an output that is added to that of the level
            below, "up".
        heads: of the attention after a block; 0 for none.
        kept: whether the decoder takes its output.
    """

    kind: Kind
    role: str
    decoder: bool
    resolution: int
    cin: int
    cout: int
    skip: int = 0
    pyramid: Pyramid = ""
    resample: Resampling = ""
    heads: int = 0
    kept: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """Numbers of a U-Net.

    Attributes:
        resolution, channels, out_channels: of its images.
        first: channels of the first convolution.   widths: of each level, from fine to coarse.
        n_blocks: blocks of a level of the encoder.
        attention: resolutions at which blocks attend.
        head_channels: channels of a head of attention; 0 for one head of all channels.
        attends: which blocks of a level of the decoder attend, "last" or "all".
        input, output: pyramids of the image, from the input and to the output.
        resampling: whether the resolution changes in a "block" or in a convolution ("resample").
    """

    resolution: int
    channels: int
    out_channels: int
    first: int
    widths: tuple[int, ...]
    n_blocks: int
    attention: tuple[int, ...]
    head_channels: int = 0
    attends: Literal["last", "all"] = "last"
    input: Pyramid = ""
    output: Pyramid = ""
    resampling: Literal["block", "resample"] = "block"

    def heads(self, width: int) -> int:
        """Number of heads of an attention over `width` channels; 0 means that there is none."""
        return width // self.head_channels if self.head_channels else 1

    @property
    def size_multiple(self) -> int:
        """Number that image height and width must be a multiple of: 2 per halving."""
        return 2 ** (len(self.widths) - 1)


def table(shape: Shape) -> list[Row]:
    """Returns the rows of a U-Net, in the order they run."""
    encoder = _encoder(shape)
    return encoder + _decoder(shape, [row.cout for row in encoder if row.kept])


def _encoder(shape: Shape) -> list[Row]:
    rows = [Row("conv", "conv", False, shape.resolution, shape.channels, shape.first, kept=True)]
    width, pyramid = shape.first, shape.channels
    for level, cout in enumerate(shape.widths):
        at = shape.resolution >> level
        if level:
            rows.append(
                Row(shape.resampling, "down", False, at, width, width, resample="down",
                    kept=not shape.input)
            )  # fmt: skip
        if level and shape.input:
            rows.append(
                Row("pyramid", "aux", False, at, pyramid, width, pyramid=shape.input, kept=True)
            )
            pyramid = width if shape.input == "residual" else pyramid
        for block in range(shape.n_blocks):
            heads = shape.heads(cout) if at in shape.attention else 0
            rows.append(
                Row("block", f"block{block}", False, at, width, cout, heads=heads, kept=True)
            )
            width = cout
    return rows


def _decoder(shape: Shape, kept: list[int]) -> list[Row]:
    rows: list[Row] = []
    deepest = len(shape.widths) - 1
    width = kept[-1]
    for level in reversed(range(deepest + 1)):
        at, cout = shape.resolution >> level, shape.widths[level]
        if level == deepest:
            rows.append(Row("block", "in0", True, at, width, width, heads=shape.heads(width)))
            rows.append(Row("block", "in1", True, at, width, width))
        else:
            rows.append(Row(shape.resampling, "up", True, at, width, width, resample="up"))
        for block in range(shape.n_blocks + 1):
            attends = at in shape.attention and (shape.attends == "all" or block == shape.n_blocks)
            heads = shape.heads(cout) if attends else 0
            rows.append(
                Row("block", f"block{block}", True, at, width, cout, skip=kept.pop(), heads=heads)
            )
            width = cout
        if shape.output or level == 0:
            up: Resampling = "up" if shape.output and level < deepest else ""
            rows.append(Row("output", "aux", True, at, width, shape.out_channels, resample=up))
    return rows


@dataclasses.dataclass(frozen=True)
class Style:
    """Computation of a residual block, and the names of its modules.

    h = conv0(act(norm0(x))); a = affine(embedding); h = conv1(dropout(act(norm1(h + a)))), or, if
    `adaptive`, a = (s, t) and h = conv1(dropout(act(norm1(h) (1 + s) + t))); the result is
    `scale` (h + skip(x)). Norms are group norms of min(32, C / group_channels) groups.

    Attributes:
        names: of norm0, conv0, affine, norm1, conv1 and skip.
        group_channels: least channels of a group; 0 for 32 groups always.
        always_skip: whether blocks that change the resolution alone have a convolution in skip.
        matrix_skip: whether skip is a matrix over channels, instead of a 1x1 convolution.
        filter: of resampling; (1, 1) is the mean of 2x2 squares, and their repetition.
        keep_filter: whether the filter is in the state dict.
        dropout: probability.
    """

    names: tuple[str, str, str, str, str, str]
    eps: float = 1e-6
    group_channels: int = 4
    scale: float = math.sqrt(0.5)
    adaptive: bool = False
    always_skip: bool = True
    matrix_skip: bool = False
    filter: tuple[float, ...] = (1.0, 1.0)
    keep_filter: bool = False
    dropout: float = 0.1

    def groups(self, channels: int) -> int:
        """Number of groups of a group norm over `channels`."""
        return min(32, channels // self.group_channels) if self.group_channels else 32


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Embedding of the noise level: features, two linear layers, and labels.

    Attributes:
        kind: "positional", [sin, cos] of c / 10000^(k / n), or "fourier", [sin, cos] of 2 pi c W.
        features: width of the features.   width: of the linear layers.
        endpoint: whether the last frequency is 1/10000, so that n is half the features less one.
        cos_first: whether the features are [cos, sin].
        log: whether c is the logarithm of the network's input.
        scale: standard deviation of the random frequencies W.
        labels: number of classes.   augment: width of the augmentation labels.
        labels_last: whether class labels join after the linear layers.
        label_dropout: probability of leaving out the class in training.
    """

    kind: Literal["positional", "fourier"]
    features: int
    width: int
    endpoint: bool = True
    cos_first: bool = False
    log: bool = False
    scale: float = 16.0
    labels: int = 0
    augment: int = 0
    labels_last: bool = False
    label_dropout: float = 0.0
