"""Calls of every entry of the extension, with memory of exactly the size that it needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsn_fast import _C
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.ops.addresses import NONE

F32, F64, BF16, I16, I32, I64, U8 = (
    torch.float32, torch.float64, torch.bfloat16, torch.int16, torch.int32, torch.int64, torch.uint8
)  # fmt: skip


class Size(int):
    """An argument that says how much of the memory there is."""


class Memory:
    """An array argument of exactly so many elements."""

    def __init__(self, count: int, dtype: torch.dtype = F32, *, optional: bool = False) -> None:
        self.held: Tensor = torch.zeros(count, dtype=dtype)
        self.optional = optional

    @property
    def array(self) -> tuple[int, int]:
        return self.held.data_ptr(), self.held.nbytes


optional = functools.partial(Memory, optional=True)
N, C, H, W = Size(2), Size(3), Size(4), Size(6)
COUNT = N * C * H * W
NHWC_SIZES = (N, H, W, C)
WINOGRAD_VALUES, WINOGRAD_SCALES = 36 * 32 * 16, 36 * 32
PARAMETERS = [(Memory(N * C), Size(3)) for _ in range(3)]
STRIDED = (Size(H * W * C), Size(1), Size(C), C)  # of an update's channels-last map, of C channels


def noise(numel: int) -> list[Any]:
    return [Memory(N * numel), Memory(N, I64), N, Size(numel), 1, 0, 2, -1]


def norm_rows() -> list[Any]:
    return [(Memory(COUNT), 0), (Memory(COUNT, BF16), 1), (N, C, Size(H * W)), PARAMETERS]


def group_norm_rows() -> list[Any]:
    rows = [optional(C), optional(C), *(optional(N * C) for _ in range(3))]
    maps = [(Memory(COUNT), 0), (Memory(COUNT, BF16), 1), (N, C, Size(H * W)), 3, rows]
    return [*maps, 3, 1e-5, Memory(N * 2 * C), Memory(N * 3 * C), False]


def update_rows() -> list[Any]:
    rows = (Memory(5 * 12), Memory(5 * 2, I64), Memory(1, I32), Size(5))
    return [
        Memory(COUNT), optional(COUNT), (N, C, Size(H * W)), (Memory(COUNT), (0, *STRIDED)), rows,
        Memory(N, I64), Memory(N, I64), optional(2 * N), optional(COUNT, U8), optional(COUNT),
        (optional(COUNT, BF16), (1, *STRIDED)), optional(N, I32),
    ]  # fmt: skip


def sampler_update() -> list[Any]:
    row = (1.0, 0.5, 0.1, 0.2, 0.3, 0.4, 0.6, -0.2, 0.5, 2.0, -1.0)
    return [
        Memory(COUNT), Memory(COUNT), optional(COUNT), N, C, Size(H * W), False, True, row,
        1, Memory(N, I64), 0, optional(2 * N), optional(COUNT, U8), optional(COUNT), 0,
        optional(COUNT, BF16), True, False, optional(N, I32), -1,
    ]  # fmt: skip


def padded(channels: int, border: int) -> Memory:
    return Memory(_C.padded_map((N, H, W, channels), border)[0], BF16)


def strip_sums(channels: int) -> Memory:
    return optional(N * _C.strips(H, W)[1] * 3 * channels)


def zero_around() -> list[Any]:
    return [padded(C, 2), (N, H, W, int(C)), 2]


def norm(per_sample: bool, border: int = -1) -> list[Any]:
    parameters = [Memory(N * C if per_sample else C) for _ in range(3)]
    flags = [True, per_sample, False, True, True, 1e-5]
    y, sums = Memory(COUNT, BF16), [NONE, 0, -1]
    if border >= 0:
        y, sums = padded(C, border), [strip_sums(C), W, border]
    return [Memory(COUNT), y, *parameters, N, C, Size(H * W), *flags, *sums]


def add_elu() -> list[Any]:
    return [Memory(COUNT), *(optional(COUNT) for _ in range(3)), Size(COUNT), False]


def add_activation() -> list[Any]:
    arrays = add_elu()[:4]
    return [*arrays, Size(N * H * W), C, False, 3, 1.0, 0.5, (0, 0, 0, 0), -1]


def add_activation_padded() -> list[Any]:
    maps = [Memory(COUNT, BF16), optional(COUNT, BF16), optional(COUNT, BF16), padded(C, 2)]
    return [*maps, Size(N * H * W), C, True, 3, 1.0, 0.5, NHWC_SIZES, 2]


def group_norm(layout: bool, border: int = -1) -> list[Any]:
    rows = [optional(C), optional(C), *(optional(N * C) for _ in range(3))]
    sizes = [N, C, Size(H * W), 3, layout, False, True, 3, 1e-5]
    y, sums = Memory(COUNT, BF16), [NONE, 0, -1]
    if border >= 0:
        y, sums = padded(C, border), [strip_sums(C), W, border]
    return [Memory(COUNT), y, *rows, *sizes, *sums]


def scale_shift() -> list[Any]:
    rows = [optional(N * C), optional(N * C)]
    return [Memory(COUNT), Memory(COUNT, BF16), *rows, N, C, Size(H * W), True, False, True, 3]


def channel_moments() -> list[Any]:
    return [Memory(COUNT), Memory(N * 2 * C, F64), (N, C, Size(H * W)), True, False, -1]


def norm_gradient(layout: bool) -> list[Any]:
    rows = [optional(N * 5 * C), optional(N * 2 * C, F64), optional(COUNT, BF16)]
    maps = [Memory(COUNT, BF16), Memory(COUNT, BF16)]
    return [*maps, *rows, (N, C, Size(H * W)), layout, True, 3, -1]


def copy_channels() -> list[Any]:
    pixels = N * H * W
    maps = [Memory(pixels * 5), Memory(pixels * 4, BF16)]
    return [*maps, Size(pixels), C, Size(5), Size(2), Size(4), Size(1), False, True]


def upsample_nearest() -> list[Any]:
    return [Memory(COUNT), Memory(COUNT * 6), NHWC_SIZES, Size(2), Size(3), False]


def depthwise_transposed() -> list[Any]:
    """4 taps with stride 2 and padding 1."""
    sizes = [NHWC_SIZES, Size(8), Size(12), Size(4), 2, 1, True]
    return [Memory(COUNT, BF16), Memory(16 * C), optional(C), Memory(COUNT * 4, BF16), *sizes]


def depth_to_space() -> list[Any]:
    """Squares of 2x2 without their first row and column."""
    out = N * C * 7 * 11
    return [Memory(COUNT * 4), Memory(out), NHWC_SIZES, Size(7), Size(11), Size(2), 1, False]


def attention(dtype: torch.dtype) -> list[Any]:
    """Two heads of 3 and 4 elements; each row has an element more than it needs."""
    sizes = (N, Size(2), Size(5), Size(6), C, Size(4))
    rows = [
        (9, 4, 10, 3),
        (8, 3, 12, 3),
        (12, 5, 12, 4),
        (11, 5, 10, 4),
    ]  # row, head, tokens, width
    memory = [Memory((tokens - 1) * row + head + width, dtype) for row, head, tokens, width in rows]
    layouts = [(Size(row), Size(head)) for row, head, _, _ in rows]
    return [*memory, sizes, *layouts, 0.5, dtype is BF16]


def pool5(dtype: torch.dtype, border: int = -1) -> list[Any]:
    y = Memory(COUNT, dtype) if border < 0 else padded(C, border)
    return [Memory(COUNT, dtype), y, NHWC_SIZES, dtype is BF16, border]


def mean_pool2() -> list[Any]:
    return [Memory(COUNT, BF16), optional(COUNT, BF16), Memory(COUNT // 4, BF16), NHWC_SIZES, True]


def resize_add() -> list[Any]:
    out = N * C * 5 * 7
    return [Memory(COUNT), optional(out), Memory(out), NHWC_SIZES, Size(5), Size(7), False]


def winograd(bfloat16: bool) -> list[Any]:
    weights = [Memory(WINOGRAD_VALUES, I16 if bfloat16 else F32)]
    weights.append(Memory(WINOGRAD_SCALES) if bfloat16 else NONE)
    kind, out_channels = (BF16 if bfloat16 else F32), Size(5)
    x, out = Memory(COUNT, kind), Memory(N * H * W * out_channels, kind)
    options = [NHWC_SIZES, out_channels, 1, bfloat16]
    added = Memory(N * H * W * out_channels, kind, optional=True)
    return [x, *weights, optional(out_channels), added, out, *options]


def winograd_pack(bfloat16: bool) -> list[Any]:
    values = Memory(WINOGRAD_VALUES, I16 if bfloat16 else F32)
    scales = Memory(WINOGRAD_SCALES) if bfloat16 else NONE
    return [Memory(5 * 3 * 9), values, scales, Size(3), Size(5), bfloat16]


def tile_conv(border: int = -1, y_border: int = -1) -> list[Any]:
    x, out = Memory(COUNT, BF16) if border < 0 else padded(C, border), N * H * W * 5
    maps = [optional(out, BF16) for _ in range(3)]
    if y_border >= 0:
        maps[2] = padded(5, y_border)
    values = Memory(9 * 32 * 32, BF16)
    channels = C if border < 0 else int(C)  # a padded pixel has room for 32
    sizes = [(N, H, W, channels), Size(5), 3, 1, 1, border, y_border]
    return [x, values, optional(5), *maps, strip_sums(5), *sizes]


def plan() -> Any:
    return _C.Plan(*onednn.addresses())


def plan_method(name: str) -> Callable[..., object]:
    """A method of a plan, which is then run."""

    def call(*arguments: Any) -> None:
        made = plan()
        getattr(made, name)(*arguments)
        made.run(-1)

    return call


def level_parameters() -> list[Any]:
    return [Memory(7 * 9), Size(7), N, C, *(Memory(N * C) for _ in range(3))]


def set_levels(*arguments: Any) -> None:
    made = plan()
    table, rows = Memory(7 * 9), [Memory(N * C) for _ in range(3)]
    made.level_parameters(table.array, 7, int(N), int(C), *(row.array for row in rows))
    made.set_levels(*arguments)


def sample() -> list[Any]:
    return [
        Memory(COUNT), Memory(COUNT), optional(COUNT), NHWC_SIZES, False, 1, Memory(N, I64),
        optional(2 * N), optional(COUNT, U8), optional(COUNT), Memory(COUNT),
        Memory(2 * 11, torch.float64), Memory(2 * 2, I64), Size(2), -1,
    ]  # fmt: skip


STEPS = {
    "instance_norm_plus": [lambda: norm(True), lambda: norm(False), lambda: norm(True, 1)],
    "zero_around": [zero_around],
    "add_elu": [add_elu],
    "add_activation": [add_activation, add_activation_padded],
    "group_norm": [
        lambda: group_norm(True), lambda: group_norm(False), lambda: group_norm(True, 3),
    ],
    "scale_shift": [scale_shift],
    "copy_channels": [copy_channels],
    "upsample_nearest": [upsample_nearest],
    "depthwise_transposed": [depthwise_transposed],
    "depth_to_space": [depth_to_space],
    "softmax": [lambda: [Memory(15, BF16), Size(5), Size(3), 0.5, True]],
    "attention": [lambda: attention(F32), lambda: attention(BF16)],
    "max_pool5": [lambda: pool5(F32), lambda: pool5(BF16, 1)],
    "avg_pool5": [lambda: pool5(BF16), lambda: pool5(BF16, 2)],
    "mean_pool2": [mean_pool2],
    "resize_add": [resize_add],
    "winograd_conv": [lambda: winograd(True), lambda: winograd(False)],
    "tile_conv": [tile_conv, lambda: tile_conv(1, 2), lambda: tile_conv(3, 0)],
}  # fmt: skip
# Name of an entry -> the function, and arguments of calls that fit exactly.
ENTRIES: dict[str, tuple[Callable[..., object], list[Callable[[], list[Any]]]]] = {
    "philox_words": (_C.philox_words, [lambda: noise(12)]),
    "uniform": (_C.uniform, [lambda: noise(10)]),
    "normal": (_C.normal, [lambda: noise(10)]),
    "box_muller": (_C.box_muller, [lambda: [Memory(6), Memory(6, I32), Size(3), -1]]),
    "sampler_update": (_C.sampler_update, [sampler_update]),
    "channel_moments": (_C.channel_moments, [channel_moments]),
    "norm_gradient": (
        _C.norm_gradient, [lambda: norm_gradient(True), lambda: norm_gradient(False)],
    ),
    "norm_tiles": (_C.norm_tiles, [lambda: [C, Size(H * W), 0]]),
    "convert_float16": (
        _C.convert_float16,
        [lambda: [Memory(5), Memory(5, torch.float16), Size(5), True]],
    ),
    "instance_norm_plus_rows": (
        _C.instance_norm_plus_rows,
        [lambda: [*norm_rows(), optional(C), True, 1e-5, -1]],
    ),
    "emulated_instance_norm_plus": (
        _C.emulated_instance_norm_plus,
        [
            lambda: [*norm_rows(), optional(C), True, 1e-5, Memory(N * 2 * C), False, False],
            lambda: [*norm_rows(), optional(C), True, 1e-5, NONE, True, False],
        ],
    ),
    "emulated_group_norm": (_C.emulated_group_norm, [group_norm_rows]),
    "sampler_update_rows": (_C.sampler_update_rows, [lambda: [*update_rows(), -1]]),
    "emulated_sampler_update": (_C.emulated_sampler_update, [lambda: [*update_rows(), False]]),
    "winograd_sizes": (_C.winograd_sizes, [lambda: [Size(3), Size(5)]]),
    "winograd_pack": (
        _C.winograd_pack,
        [lambda: winograd_pack(True), lambda: winograd_pack(False)],
    ),
    "tile_product": (
        _C.tile_product,
        [
            lambda: [
                Memory(256), Memory(31, I32), Memory(16 + 15 * 17, I32),
                (Size(16), Size(1), Size(17)), -1,
            ]
        ],
    ),
    "tile_conv_values": (_C.tile_conv_values, [lambda: [Size(3), Size(5), 3]]),
    "padded_map": (_C.padded_map, [lambda: [NHWC_SIZES, 2]]),
    "strips": (_C.strips, [lambda: [H, W]]),
    "tile_pack": (
        _C.tile_pack,
        [lambda: [Memory(5 * 3 * 9), Memory(9 * 32 * 32, BF16), Size(3), Size(5), 3]],
    ),
    "Plan.level_parameters": (plan_method("level_parameters"), [level_parameters]),
    "Plan.set_levels": (set_levels, [lambda: [Memory(N, I64), N]]),
    "Plan.sample": (lambda *arguments: plan().sample(*arguments), [sample]),
    **{
        name: (getattr(_C, name), [lambda make=make: [*make(), -1] for make in calls])
        for name, calls in STEPS.items()
    },
    **{f"Plan.{name}": (plan_method(name), calls) for name, calls in STEPS.items()},
}  # fmt: skip


def written(value: Any) -> Any:
    """Arguments as the extension takes them."""
    if isinstance(value, Memory):
        return value.array
    return type(value)(map(written, value)) if isinstance(value, (list, tuple)) else value
