"""Inception network of the FID (Szegedy et al. 2016; Heusel et al. 2017).

InceptionV3 as in the FID's reference weights of 2015-12-05. It differs from the usual one: 1008
classes, average pools that do not count their padding, and a maximum instead of an average in the
pool branch of the last block. Names are those of torchvision's and pytorch-fid's state dicts. The
user provides the weights; none come with this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, FEATURES, CLASSES = 299, 2048, 1008

# A convolution: name, output channels, kernel (h, w), stride. Padding keeps the size at stride 1.
Conv = tuple[str, int, tuple[int, int], int]
# A branch: its pool, then its stages; the parallel convolutions of a stage are concatenated.
Branch = tuple[str, list[list[Conv]]]

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _conv(name: str, width: int, height: int = 1, breadth: int = 0, stride: int = 1) -> list[Conv]:
    return [(name, width, (height, breadth or height), stride)]


def _side_by_side(name: str, width: int) -> list[Conv]:
    return [*_conv(f"{name}a", width, 1, 3), *_conv(f"{name}b", width, 3, 1)]


def _block_a(pooled: int) -> list[Branch]:
    """Returns the branches of a 35 x 35 block."""
    triple = [_conv("branch3x3dbl_1", 64), *(_conv(f"branch3x3dbl_{i}", 96, 3) for i in (2, 3))]
    return [
        ("", [_conv("branch1x1", 64)]),
        ("", [_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)]),
        ("", triple),
        ("average", [_conv("branch_pool", pooled)]),
    ]


def _block_b() -> list[Branch]:
    """Returns the branches of the block that reduces 35 x 35 to 17 x 17."""
    triple = [_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3)]
    return [
        ("", [_conv("branch3x3", 384, 3, stride=2)]),
        ("", [*triple, _conv("branch3x3dbl_3", 96, 3, stride=2)]),
        ("halve", []),
    ]


def _block_c(width: int) -> list[Branch]:
    """Returns the branches of a 17 x 17 block, whose 7 x 7 convolutions are factorised."""
    single = [
        _conv("branch7x7_1", width), _conv("branch7x7_2", width, 1, 7),
        _conv("branch7x7_3", 192, 7, 1),
    ]  # fmt: skip
    double = [
        _conv("branch7x7dbl_1", width), _conv("branch7x7dbl_2", width, 7, 1),
        _conv("branch7x7dbl_3", width, 1, 7), _conv("branch7x7dbl_4", width, 7, 1),
        _conv("branch7x7dbl_5", 192, 1, 7),
    ]  # fmt: skip
    return [
        ("", [_conv("branch1x1", 192)]),
        ("", single),
        ("", double),
        ("average", [_conv("branch_pool", 192)]),
    ]


def _block_d() -> list[Branch]:
    """Returns the branches of the block that reduces 17 x 17 to 8 x 8."""
    factored = [
        _conv("branch7x7x3_1", 192), _conv("branch7x7x3_2", 192, 1, 7),
        _conv("branch7x7x3_3", 192, 7, 1), _conv("branch7x7x3_4", 192, 3, stride=2),
    ]  # fmt: skip
    return [
        ("", [_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)]),
        ("", factored),
        ("halve", []),
    ]


def _block_e(pool: str) -> list[Branch]:
    """Returns the branches of an 8 x 8 block, with parallel 1 x 3 and 3 x 1 convolutions."""
    double = [_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3)]
    return [
        ("", [_conv("branch1x1", 320)]),
        ("", [_conv("branch3x3_1", 384), _side_by_side("branch3x3_2", 384)]),
        ("", [*double, _side_by_side("branch3x3dbl_3", 384)]),
        (pool, [_conv("branch_pool", 192)]),
    ]


MIXED: dict[str, list[Branch]] = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(), "Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("maximum"),
}  # fmt: skip


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(
        self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Inception block: parallel branches, concatenated; see MIXED."""

    def __init__(self, c_in: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for _, stages in branches:
            c = c_in
            for stage in stages:
                for name, c_out, kernel, stride in stage:
                    self.add_module(name, ConvNormReLU(c, c_out, kernel, stride))
                c = sum(conv[1] for conv in stage)
            self.width += c

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for pool, stages in self.branches:
            y = POOLS[pool](x)
            for stage in stages:
                y = torch.cat([self.get_submodule(name)(y) for name, *_ in stage], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class FIDInception(nn.Module):
    """Inception network: images (N, 3, H, W) in [0, 1] -> features (N, 2048), logits (N, classes).

    Images are resized to 299 x 299 (bilinear, corners not aligned, no anti-aliasing) and scaled to
    [-1, 1], as in pytorch-fid. Logits omit the classifier's bias, as in the published inception
    scores (Salimans et al. 2016).
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, (3, 3), padded=False)
        width = 192
        for name, branches in MIXED.items():
            block = Mixed(width, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = POOLS["halve"](x)
        for name in MIXED:
            x = self.get_submodule(name)(x)
        features = x.mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)
