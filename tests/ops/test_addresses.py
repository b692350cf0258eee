"""The one place where addresses are taken for C++, and what the extension refuses by itself.

Every entry of the extension is called with memory of exactly the size that it needs (a sanitizer
sees any access beyond), and then with each array too short, missing or misaligned and with each
size negative, too large and one larger.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ncsn_fast import _C
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.ops import addresses
from ncsn_fast.ops.addresses import NHWC, NONE

F32, BF16, I16, I32, I64, U8 = (
    torch.float32, torch.bfloat16, torch.int16, torch.int32, torch.int64, torch.uint8
)  # fmt: skip


# What Python checks ------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("x", "options", "error", "text"),
    [
        (X[:1], {}, ValueError, r"h must have shape \(2, 3, 4, 5\); got \(1, 3, 4, 5\)"),
        (X.double(), {}, TypeError, "h must be torch.float32; got torch.float64"),
        (X.bfloat16(), {}, TypeError, "h must be torch.float32; got torch.bfloat16"),
        (X.to("meta"), {}, ValueError, "h must be on cpu; it is on meta"),
        (X[:1].expand(2, 3, 4, 5), {}, ValueError, r"h must be contiguous; got strides \(0, 20, "),
        (X.to(memory_format=NHWC), {}, ValueError, r"Use h\.contiguous\(\)"),
        (
            X,
            {"layout": NHWC},
            ValueError,
            "channels-last; .*memory_format=torch.channels_last",
        ),
        (X, {"device": torch.device("cuda", 0)}, ValueError, "h must be on cuda:0; it is on cpu"),
        (X.numpy(), {}, TypeError, "h must be a tensor; got ndarray"),
        ([0.0], {}, TypeError, "h must be a tensor; got list"),
    ],
)
def test_only_the_tensor_that_was_promised_has_an_address(x, options, error, text):
    with pytest.raises(error, match=text):
        addresses.array("h", x, (2, 3, 4, 5), F32, **options)


def test_an_array_is_the_tensors_memory():
    assert addresses.array("x", X, (2, 3, 4, 5), F32) == (X.data_ptr(), 480)
    assert addresses.array("x", X.to(memory_format=NHWC), X.shape, F32, layout=NHWC)[1] == 480
    assert addresses.array("x", None, (2, 3, 4, 5), F32) == NONE
    assert addresses.array("x", X[:0], (0, 3, 4, 5), F32)[1] == 0
    assert addresses.strided("x", X[1, 1:]) == (X.data_ptr() + 320, 160)
    assert addresses.part(memory := torch.zeros(64, dtype=U8), 16, 48)[0] == memory.data_ptr() + 16


def test_a_tensor_whose_storage_was_freed_has_no_address():
    x = torch.zeros(4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x must have memory; its storage has been freed"):
        addresses.array("x", x, (4,), F32)
    with pytest.raises(ValueError, match="x must have memory; its storage has been freed"):
        addresses.strided("x", x)


@pytest.mark.parametrize(("offset", "size"), [(0, 65), (60, 5), (-1, 4), (65, 0), (8, -1)])
def test_parts_lie_within_their_memory(offset, size):
    with pytest.raises(ValueError, match=f"64 bytes of memory have no part of {size} at {offset}"):
        addresses.part(torch.zeros(64, dtype=U8), offset, size)


# What the extension checks -----------------------------------------------------------------------


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
CASES = [
    pytest.param(function, make, id=f"{name}-{i}")
    for name, (function, calls) in ENTRIES.items()
    for i, make in enumerate(calls)
]


def written(value: Any) -> Any:
    """Arguments as the extension takes them."""
    if isinstance(value, Memory):
        return value.array
    return type(value)(map(written, value)) if isinstance(value, (list, tuple)) else value


def variants(value: Any, change: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """The arguments with one of them changed, in every way that `change` has for it."""
    if not isinstance(value, (list, tuple)):
        yield from change(value)
        return
    for i, item in enumerate(value):
        for changed in variants(item, change):
            yield type(value)([*value[:i], changed, *value[i + 1 :]])


def wrong_memory(value: Any) -> Iterator[Any]:
    if isinstance(value, Memory):
        address, size = value.array
        yield address, size - 1
        yield address, 0
        yield address, -size
        yield 2**64 - 4096, size + 4096
        if value.held.element_size() > 1:
            yield address + 1, size
        if not value.optional:
            yield NONE


def wrong_sizes(value: Any) -> Iterator[Any]:
    if isinstance(value, Size):
        yield from (-1, -(2**63), 2**62, 2**63 - 1)


def larger_sizes(value: Any) -> Iterator[Any]:
    if isinstance(value, Size):
        yield value + 1


def without_memory(value: Any) -> Iterator[Any]:
    if isinstance(value, Memory) and value.optional:
        yield NONE


def test_every_entry_is_walked():
    told = {"build_info", "isa_levels", "default_isa", "cuda_device_count", "set_num_threads"}
    told |= {"Plan", "amx_state"}
    entries = {name for name in dir(_C) if not name.startswith("_")} - told
    entries |= {f"Plan.{name}" for name in dir(_C.Plan) if not name.startswith("_")}
    # Those without sizes; below.
    entries -= {f"Plan.{name}" for name in ("run", "profile", "callback", "convolution", "product")}
    assert {name for name in entries if not name.endswith("_cuda")} == set(ENTRIES)


@pytest.mark.parametrize(("function", "make"), CASES)
def test_memory_of_exactly_the_right_size_is_enough(function, make):
    arguments = make()
    function(*written(arguments))
    for fewer in variants(arguments, without_memory):
        try:
            function(*written(fewer))
        except ValueError as error:
            assert "come together" in str(error) or "is written" in str(error)  # noqa: PT017


@pytest.mark.parametrize(("function", "make"), CASES)
def test_arrays_that_do_not_fit_are_refused(function, make):
    arguments = make()
    for wrong in variants(arguments, wrong_memory):
        with pytest.raises(ValueError, match=r"must (have|begin)|have scales"):
            function(*written(wrong))


@pytest.mark.parametrize(("function", "make"), CASES)
def test_sizes_that_cannot_be_are_refused(function, make):
    arguments = make()
    changes = [wrong_sizes]
    if any(True for _ in variants(arguments, wrong_memory)):
        changes.append(larger_sizes)
    for wrong in itertools.chain(*(variants(arguments, change) for change in changes)):
        with pytest.raises(ValueError, match=r"must|has no pixels"):
            function(*written(wrong))


@pytest.mark.parametrize("threads", [0, -1, 4097, 2**31, -(2**63)])
def test_threads_that_cannot_be_started_are_refused(threads):
    with pytest.raises(ValueError, match=rf"threads must be in \[1, 4096\]; got {threads}"):
        _C.set_num_threads(threads)


def test_a_plan_takes_no_address_of_nothing():
    for i in range(4):
        with pytest.raises(ValueError, match="four functions of libtorch"):
            _C.Plan(*(int(i != k) for k in range(4)))
    with pytest.raises(TypeError):
        _C.Plan(-1, 1, 1, 1)


def test_a_product_needs_its_tensors():
    made = plan()
    for missing in (0, 2, 3):  # without `added` it is one of batches
        capsules = onednn.owned([torch.zeros(2, 2) for _ in range(4)])
        capsules[missing] = None
        with pytest.raises(TypeError):
            made.product("product", *capsules)
    assert len(made) == 0


def test_a_convolution_needs_its_tensors_and_its_memory():
    made, memory = plan(), Memory(16)
    sizes = [(1, 1), (1, 1), (1, 1)]

    def capsules() -> list[Any]:
        x = torch.zeros(1, 1, 4, 4)
        weight = torch.zeros(1, 1, 3, 3)
        return onednn.owned([x, x.clone(), weight])

    with pytest.raises(TypeError):
        made.convolution("conv", None, *capsules()[1:], None, *sizes, 1, memory.array, 64)
    for array, zero in ((memory.array, 65), (NONE, 64), (memory.array, -1)):
        with pytest.raises(ValueError, match="must"):
            made.convolution("conv", *capsules(), None, *sizes, 1, array, zero)
    assert len(made) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*winograd(True)[:2], NONE, *winograd(True)[3:], -1], "have scales; there are none"),
        ([*winograd(False)[:2], Memory(1152), *winograd(False)[3:], -1], "have no scales; some"),
        ([*winograd(True)[:-2], 0, True, -1], r"dilation must be in \[1, 2\*\*31\); got 0"),
        ([*winograd(True)[:-2], 2**31, True, -1], "dilation must be"),
        ([*winograd(True)[:6], (2, 4, 6, 0), 5, 1, True, -1], "channels of a Winograd"),
        ([*winograd(True)[:6], NHWC_SIZES, 2**21, 1, True, -1], "channels of a Winograd"),
    ],
)
def test_parts_of_a_winograd_convolution_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        _C.winograd_conv(*written(arguments))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({9: 2}, "taps of a convolution in tiles must be 1 or 3 a side; got 2"),
        ({10: 0}, r"dilation must be in \[1, 2\*\*31\); got 0"),
        ({8: 2**21}, r"channels of a convolution in tiles must be in \[1, 2\*\*20\]"),
        ({11: 8}, r"activation must be in \[0, 8\); got 8"),
        ({4: NONE, 5: NONE, 6: NONE}, "sum, y or both is written, .*; it was not given"),
        ({4: NONE}, "and sum with strip_sums; it was not given"),
        ({12: -2}, r"border must be in \[0, 2\*\*20\]; got -2"),
        ({13: 2**21}, r"border must be in \[0, 2\*\*20\]; got 2097152"),
        ({12: 0}, "the border of x must be at least 1, or -1; got 0"),
    ],
)
def test_parts_of_a_convolution_in_tiles_that_do_not_fit(changes, text):
    arguments = [changes.get(i, value) for i, value in enumerate(tile_conv())]
    with pytest.raises(ValueError, match=text):
        _C.tile_conv(*written([*arguments, -1]))


def test_what_a_kernel_would_not_compute_is_refused():
    odd = [Memory(2 * 3 * 5 * 6), NONE, Memory(2 * 3 * 2 * 3), (2, 5, 6, 3), False, -1]
    with pytest.raises(ValueError, match="height and width must be even; got 5 and 6"):
        _C.mean_pool2(*written(odd))
    with pytest.raises(ValueError, match="x has no pixels to resize to 5x7"):
        _C.resize_add(*written([NONE, NONE, Memory(210), (2, 0, 6, 3), 5, 7, False, -1]))
    a = Memory(8).array
    for arrays in ((a, NONE, NONE, NONE), (a, NONE, a, a), (a, a, NONE, NONE)):
        with pytest.raises(ValueError, match="is written"):
            _C.add_elu(*arrays, 8, False, -1)
    for code in (-1, 8, 2**40):
        arguments = written([*group_norm(True)[:14], code, *group_norm(True)[15:], -1])
        with pytest.raises(ValueError, match=r"activation must be in \[0, 8\); got"):
            _C.group_norm(*arguments)
    for change in ({16: NONE, 17: 5}, {17: 0}, {11: False}):
        arguments = [change.get(i, value) for i, value in enumerate(group_norm(True, 1))]
        with pytest.raises(ValueError, match=r"must be channels-last, in rows of `width` pixels; "):
            _C.group_norm(*written([*arguments, -1]))
    for change in ({13: False}, {17: 6, 16: NONE, 13: False}):
        arguments = [change.get(i, value) for i, value in enumerate(group_norm(True, 1))]
        with pytest.raises(ValueError, match="y must be bfloat16, as it has a border; got float32"):
            _C.group_norm(*written([*arguments, -1]))
    arguments = written([*add_activation_padded()[:10], (2, 4, 6, 2), 2, -1])
    words = "must have `pixels` of `channels`, 48 of 3; got 96 elements in 2 channels"
    with pytest.raises(ValueError, match=words):
        _C.add_activation(*arguments)
    for groups in (0, -1, 2, 2**40):
        arguments = written([*group_norm(True)[:10], groups, *group_norm(True)[11:], -1])
        with pytest.raises(ValueError, match="groups must divide the channels"):
            _C.group_norm(*arguments)
    with pytest.raises(ValueError, match="levels must be those of 2 images; got 3"):
        set_levels(Memory(3, I64).array, 3)
    with pytest.raises(ValueError, match=r"at most 2\*\*34 elements"):
        _C.uniform(Memory(1).array, Memory(1, I64).array, 1, 2**34 + 1, 0, 0, 0)


class Gapped(Memory):
    """A map whose pixels of `channels` elements have gaps behind them."""

    def __init__(self, pixels: int, channels: int, dtype: torch.dtype = F32) -> None:
        self.row = channels + 2
        super().__init__(pixels * self.row - 2, dtype)

    @property
    def array(self) -> Any:
        return (*super().array, self.row)


def gapped() -> dict[str, list[Any]]:
    """Calls that write a map with gaps between its pixels, and the place of that array in them."""
    pixels = N * H * W

    def call(arguments: list[Any], at: int, y: Memory) -> list[Any]:
        arguments[at] = y
        return [arguments, at]

    adds, of_a = add_activation(), [Memory(COUNT), NONE, NONE, NONE]
    tiles = tile_conv()
    tiles[4] = tiles[6] = NONE  # y alone
    return {
        "add_activation": call([*of_a, *adds[4:]], 3, Gapped(pixels, C)),
        "group_norm": call(group_norm(True), 1, Gapped(pixels, C, BF16)),
        "upsample_nearest": call(upsample_nearest(), 1, Gapped(pixels * 6, C)),
        "depth_to_space": call(depth_to_space(), 1, Gapped(N * 7 * 11, C)),
        "winograd_conv": call(winograd(True), 5, Gapped(pixels, 5, BF16)),
        "tile_conv": call(tiles, 5, Gapped(pixels, 5, BF16)),
    }


@pytest.mark.parametrize("name", gapped())
def test_pixels_with_gaps_are_written_where_a_kernel_can(name):
    arguments, at = gapped()[name]
    arguments[at].held.fill_(7)
    call, values = getattr(_C, name), written([*arguments, -1])
    call(*values)
    y = arguments[at]
    gaps = torch.nn.functional.pad(y.held, (0, 2)).view(-1, y.row)[:-1, -2:]
    assert gaps.eq(7).all()
    address, size, row = values[at]
    for wrong in ((address, size - 1, row), (address, size, row + 1), (address, size, row - 3)):
        values[at] = wrong
        with pytest.raises(ValueError, match="must have"):
            call(*values)
    values[at] = address, size, -row
    with pytest.raises(ValueError, match="must have pixels of"):
        call(*values)


@pytest.mark.parametrize("name", sorted({*STEPS} - {*gapped()}))
def test_pixels_with_gaps_are_refused_where_no_kernel_can(name):
    for make in STEPS[name]:
        arguments = written(make())
        values = [(*a, 99) if i == 0 else a for i, a in enumerate(arguments)]
        with pytest.raises(ValueError, match="must have pixels without gaps between them"):
            getattr(_C, name)(*values, -1)
