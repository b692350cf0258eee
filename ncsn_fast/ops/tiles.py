"""Convolution in the tiles of Intel AMX, with what follows it; emulated at every other level.

As in `ops.cpu`, a call writes into preallocated maps, bypasses the dispatcher and autograd, and
gives the same bits for every instruction set, thread count and batch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncsn_fast.ops.activations import activation_code
from ncsn_fast.ops.addresses import DENSE, Array, array
from ncsn_fast.ops.extension import _C, AMX_LEVELS, default_isa, forced_isa, level_name
from ncsn_fast.ops.map_checks import check_maps, check_outputs, map_of

TAPS = (1, 3)


def problem() -> str | None:
    """Returns why this process cannot use AMX; None where it can."""
    compiled, processor, enabled, refusal = _C.amx_state()
    if not compiled:
        return "this build has no kernels for it: it needs Linux on x86-64, and GCC 11 or Clang 12"
    if not processor:
        return "this processor has none (amx_tile and amx_bf16, in /proc/cpuinfo)"
    if not enabled:
        return (
            "the system has not enabled it: it needs Linux 5.16, and a guest its host's permission"
        )
    if refusal:
        name = errno.errorcode.get(refusal, str(refusal))
        return (
            f"the system gives this process no permission (arch_prctl: {name}, "
            f"{os.strerror(refusal)}): it needs Linux 5.16, and a sandbox that allows the call"
        )
    return None


def state() -> str:
    """Describes in one line whether AMX is used, and why not."""
    if (reason := problem()) is not None:
        return f"not used: {reason}"
    level = default_isa()
    return "used" if level in AMX_LEVELS else f"not used: the level is {level}"


def level() -> str | None:
    """Returns the level in force if convolutions in tiles are wanted at it, else None.

    That is "amx", or "amx_emulated", which only tests force.
    """
    name = level_name(forced_isa.get())
    return name if name in AMX_LEVELS else None


class TileWeights(NamedTuple):
    """Weights packed by `tile_pack` for `tile_conv_out`."""

    values: Tensor  # bfloat16
    in_channels: int
    out_channels: int
    taps: int

    def check(self) -> None:
        """Raises unless the values fit the sizes."""
        array("weights.values", self.values, (self._count(),), torch.bfloat16)

    def _count(self) -> int:
        return _C.tile_conv_values(self.in_channels, self.out_channels, self.taps)


def tile_pack(weight: Tensor) -> TileWeights:
    """Packs weights of a convolution, (O, I, 1, 1) or (O, I, 3, 3), float32 or bfloat16."""
    if weight.ndim != 4 or weight.shape[2:] not in [(k, k) for k in TAPS] or not weight.numel():
        raise ValueError(
            f"weight must have shape (O, I, 1, 1) or (O, I, 3, 3); got {tuple(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weight must be float32 or bfloat16; got {weight.dtype}")
    if not weight.is_cpu:
        raise ValueError(f"weight must be on the CPU; it is on {weight.device}")
    outputs, inputs, taps, _ = shape = tuple(weight.shape)
    values = torch.empty(_C.tile_conv_values(inputs, outputs, taps), dtype=torch.bfloat16)
    plain = weight.detach().float().contiguous()
    _C.tile_pack(
        array("weight", plain, shape, torch.float32),
        array("values", values, tuple(values.shape), torch.bfloat16), inputs, outputs, taps,
    )  # fmt: skip
    return TileWeights(values, inputs, outputs, taps)


class Strips(NamedTuple):
    """Strips of an image: rows of one (the last may have fewer), and their number."""

    rows: int
    number: int

    @classmethod
    def of(cls, height: int, width: int) -> Strips:
        return cls(*_C.strips(height, width))

    def sums_shape(self, batch: int, channels: int) -> tuple[int, int, int, int]:
        """Shape of the sums that a convolution leaves for a norm; see `tile_conv_out`."""
        return batch, self.number, 3, channels


class PaddedLayout(NamedTuple):
    """Layout of a map with zeros around every image, in elements of its memory."""

    elements: int  # of the memory
    first: int  # of the first pixel
    image: int  # from an image to the next
    row: int
    pixel: int

    @classmethod
    def of(cls, batch: int, height: int, width: int, channels: int, border: int) -> PaddedLayout:
        return cls(*_C.padded_map((batch, height, width, channels), border))

    def pixels(self, memory: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns the map (N, C, H, W) in its memory."""
        strides = (self.image, 1, self.row, self.pixel)
        return memory[self.first :].as_strided(tuple(shape), strides)


class Padded(NamedTuple):
    """A bfloat16 map with zeros around every image, which convolutions in tiles read as it lies."""

    memory: Tensor
    shape: tuple[int, int, int, int]  # N, C, H, W
    border: int  # pixels of zeros

    @classmethod
    def zeros(cls, shape: tuple[int, int, int, int], border: int) -> Padded:
        """Allocates a map of zeros."""
        elements = _padded_layout(shape, border).elements
        return cls(torch.zeros(elements, dtype=torch.bfloat16), shape, border)

    @property
    def pixels(self) -> Tensor:
        """The map as a view (N, C, H, W) of its memory."""
        return _padded_layout(self.shape, self.border).pixels(self.memory, self.shape)

    def array(self, name: str) -> Array:
        """The memory, which has the right size."""
        elements = _padded_layout(self.shape, self.border).elements
        return array(name, self.memory, (elements,), torch.bfloat16)


def _padded_layout(shape: tuple[int, int, int, int], border: int) -> PaddedLayout:
    n, c, height, width = shape
    return PaddedLayout.of(n, height, width, c, border)


def tile_conv_out(
    x: Tensor | Padded,
    weights: TileWeights,
    bias: Tensor | None = None,
    *,
    added: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | Padded | None = None,
    strip_sums: Tensor | None = None,
    dilation: int = 1,
    activation: str = "none",
) -> None:
    """Writes total = s, out = activation(s), or both, of s = convolution of x + bias + added.

    The convolution has stride 1 and keeps the size (padding = dilation at 3x3); see
    `reference.tile_conv`.

    Args:
        x: (N, I, H, W) bfloat16, channels-last, as all maps; or `Padded` by the dilation at least.
        weights: from `tile_pack`.
        bias: float32 (O,), or None.
        added, total, out: (N, O, H, W); total or out may be `added`, none may overlap x. out may be
            `Padded`.
        strip_sums: float32, `Strips.of(H, W).sums_shape(N, O)`: sums of total for the norm that
            reads it; see csrc/include/ncsn_fast/strip_sums.h.
    """
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1; got {dilation}")
    weights.check()
    source, border = _memory("x", x, x.shape)
    n, channels, height, width = x.shape
    if weights.in_channels != channels:
        raise ValueError(f"x must have {weights.in_channels} channels; got shape {tuple(x.shape)}")
    shape = (n, weights.out_channels, height, width)
    target, y_border = _memory("out", out, shape)
    named = (("total", total), ("out", out))
    outputs = {name: _tensor(t) for name, t in named if t is not None}
    if not outputs:
        raise ValueError("the convolution is written to total, out or both; neither was given")
    dense = {name: t for name, t in (("added", added), ("total", total)) if t is not None}
    if dense:
        check_maps(shape, torch.bfloat16, **dense)
    check_outputs({"x": _tensor(x)}, outputs)
    check_outputs({} if added is None else {"added": added}, outputs, in_place=True)
    _C.tile_conv(
        source, array("values", weights.values, tuple(weights.values.shape), torch.bfloat16),
        array("bias", bias, (weights.out_channels,), torch.float32), map_of("added", added),
        map_of("total", total), target, array(
            "strip_sums", strip_sums, Strips.of(height, width).sums_shape(n, shape[1]),
            torch.float32,
        ), (n, height, width, channels), weights.out_channels, weights.taps, dilation,
        activation_code(activation), border, y_border, forced_isa.get(),
    )  # fmt: skip


def _tensor(x: Tensor | Padded) -> Tensor:
    return x.memory if isinstance(x, Padded) else x


def _memory(name: str, x: Tensor | Padded | None, shape: Sequence[int]) -> tuple[Array, int]:
    """Returns the memory of a map of this shape, dense or padded, and its border."""
    if isinstance(x, Padded):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {x.shape}")
        return x.array(name), x.border
    if x is not None:
        check_maps(shape, torch.bfloat16, **{name: x})
    return map_of(name, x), DENSE
