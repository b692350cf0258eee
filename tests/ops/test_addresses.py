"""The one place where addresses are taken for C++, and what the extension refuses by itself.

Every entry of the extension is called with memory of exactly the size that it needs (a sanitizer
sees any access beyond), and then with each array too short, missing or misaligned and with each
size negative, too large and one larger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from extension_calls import (
    BF16,
    COUNT,
    ENTRIES,
    F32,
    I64,
    NHWC_SIZES,
    STEPS,
    U8,
    C,
    H,
    Memory,
    N,
    Size,
    W,
    add_activation,
    add_activation_padded,
    depth_to_space,
    group_norm,
    plan,
    set_levels,
    tile_conv,
    upsample_nearest,
    winograd,
    written,
)

from ncsn_fast import _C
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.ops import addresses
from ncsn_fast.ops.addresses import NHWC, NONE

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


CASES = [
    pytest.param(function, make, id=f"{name}-{i}")
    for name, (function, calls) in ENTRIES.items()
    for i, make in enumerate(calls)
]


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
