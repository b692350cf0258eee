"""The sampler update with its row in memory.

The CPU kernel against the op with a scalar row; the CUDA kernels, emulated, against the CPU kernel,
bit for bit.
"""

import itertools
import math

import pytest
import torch
from ncsn_fast.kernels.rows import Rows
from program_rows import rows_of
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import native
from ncsn_fast.ops.native import DTYPES

FLOATS = tuple(DTYPES)
FULL = (0.9, 0.37, -0.21, 0.63, 0.11, -1.3, 0.2, -0.7)
# Whole quads; pixels in fours and not; flat; one element; more channels than pixels are read for.
SHAPES = [
    (3, 3, 8, 12), (2, 4, 2, 2), (2, 1, 4, 4), (2, 3, 7, 11), (2, 2, 2, 3), (1, 1, 1, 1),
    (2, 5, 1, 3), (2, 5, 4, 4), (3, 3, 33, 32), (2, 3, 5, 1),
]  # fmt: skip
LAYOUTS = ("nchw", "nhwc", "nhwc4", "nhwc8", "nhwc16", "slice", "odd slice")


def field(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.7 - 0.3


def keys(n: int) -> Tensor:
    return torch.tensor([2**32 - 1, 5, 0, 17])[:n]


def seeds(n: int) -> Tensor:
    return torch.tensor([3, 2**32 - 1, 77, 0])[:n]


def laid_out(values: Tensor, layout: str, dtype: torch.dtype, padding: float = math.nan) -> Tensor:
    """`values` (n, c, h, w) in a layout; what pads it holds `padding`."""
    n, c, height, width = values.shape
    if layout == "nchw":
        return values.to(dtype)
    extra = {"nhwc": 0, "slice": 5, "odd slice": 5}.get(layout)
    whole = c + extra if extra is not None else max(c, int(layout[4:]))
    held = torch.full((n, height, width, whole), padding, dtype=dtype).permute(0, 3, 1, 2)
    at = {"slice": 0, "odd slice": 2}.get(layout, 0)
    view = held[:, at : at + c]
    view.copy_(values)
    return view


def some_rows(c_ref: float = 0.4) -> Rows:
    generator = torch.Generator().manual_seed(5)
    table, inputs = torch.randn(4, 8, generator=generator), torch.randn(4, 2, generator=generator)
    table[1, 3] = 0.0  # no noise
    steps = torch.tensor([[77, 3], [0, 0], [2**32 - 1, 2**32 - 1], [5, 9]])
    return rows_of(table, torch.tensor([c_ref, 0.0, math.nan, 1.3]), steps, "cpu", inputs)


def emulated_update_(
    x, f, h, rows, *, seeds, samples, noise_weights=None, mask=None, known=None, net_input=None,
    nonfinite=None, backward=False,
):  # fmt: skip
    arguments = native._update_arguments(
        x, f, h, rows, seeds, samples, noise_weights, mask, known, net_input, nonfinite,
    )  # fmt: skip
    _C.emulated_sampler_update(*arguments, backward)


def held_by(t: Tensor) -> Tensor:
    """Everything in the storage of a view, as integers: NaNs are equal."""
    words = {2: torch.int16, 4: torch.int32}[t.element_size()]
    return torch.tensor(t.untyped_storage(), dtype=torch.uint8).view(words)


def everything(update, shape, f_layout, net_layout, dtype, terms, c_ref=0.4, row=0, **options):
    """All that an update writes, padding included."""
    n = shape[0]
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    f = laid_out(f, f_layout, dtype, padding=3.0)
    net_input = laid_out(torch.full(shape, 5.0), net_layout, dtype)
    flags = torch.zeros(n, dtype=torch.int32)
    rows = some_rows(c_ref)
    rows.counter.fill_(row)
    if "noise" in terms:
        options["noise_weights"] = field(n, 2, seed=8)
    if "mask" in terms:
        options |= {"mask": field(*shape, seed=5) > 0, "known": known}
    h = h if "history" in terms else torch.zeros(0)
    update(
        x, f, h if "history" in terms else None, rows, seeds=seeds(n), samples=keys(n),
        net_input=net_input, nonfinite=flags, **options,
    )  # fmt: skip
    assert rows.counter.item() == row
    return x, h, held_by(net_input), flags


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("f_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_kernels_have_the_bits_of_the_cpu(shape, f_layout, dtype):
    for net_layout in LAYOUTS:
        arguments = (shape, f_layout, net_layout, dtype, ("history", "mask", "noise"))
        expected = everything(native.sampler_update_, *arguments)
        for backward in (False, True):
            actual = everything(emulated_update_, *arguments, backward=backward)
            for mine, theirs in zip(actual, expected, strict=True):
                assert torch.equal(mine, theirs), net_layout


@pytest.mark.parametrize("layout", ["nchw", "nhwc8"])
@pytest.mark.parametrize("row", [0, 1, 2, 3, 4, 2**31 - 1, -1])
@pytest.mark.parametrize(
    "terms", [(), ("history",), ("mask",), ("noise",), ("mask", "noise", "history")], ids=str
)
def test_every_term_and_row(terms, row, layout):
    arguments = ((2, 3, 8, 12), layout, layout, torch.bfloat16, terms)
    for c_ref in (0.4, math.nan):
        expected = everything(native.sampler_update_, *arguments, c_ref=c_ref, row=row)
        actual = everything(emulated_update_, *arguments, c_ref=c_ref, row=row)
        assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))
        if row not in range(4):  # past the end nothing changes
            assert torch.equal(actual[0], field(2, 3, 8, 12))
            assert torch.equal(
                actual[1], field(2, 3, 8, 12, seed=2) if "history" in terms else actual[1]
            )


@pytest.mark.parametrize("layout", ["nchw", "nhwc8"])
@pytest.mark.parametrize("offset", ["mask", "known"])
def test_known_pixels_need_not_be_aligned(offset, layout):
    shape = (2, 3, 8, 12)
    mask, known = field(*shape, seed=5) > 0, field(*shape, seed=3)
    shifted = {"mask": mask, "known": known}
    view = torch.zeros(known.numel() + 1, dtype=shifted[offset].dtype)[1:].view(shape)
    shifted[offset] = view.copy_(shifted[offset])
    f, states = laid_out(field(*shape, seed=1), layout, torch.bfloat16), []
    for options in ({"mask": mask, "known": known}, shifted):
        states.append(field(*shape))
        emulated_update_(
            states[-1], f, None, some_rows(), seeds=seeds(2), samples=keys(2), **options
        )
    assert torch.equal(*states)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", range(4))
def test_rows_in_memory_are_the_scalar_rows(row, shape):
    n, rows = shape[0], some_rows()
    rows.counter.fill_(row)
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    options = {"mask": field(*shape, seed=5) > 0, "noise_weights": field(n, 2, seed=8)}
    own = [t.clone() for t in (x, h)]
    native.sampler_update_(
        own[0], f, own[1], rows, seeds=seeds(n), samples=keys(n), known=known, **options
    )
    for i in range(n):
        one = slice(i, i + 1)
        expected = ops.sampler_update(
            x[one], f[one], h[one], tuple(rows.table[row, :8].tolist()), seed=int(seeds(n)[i]),
            samples=keys(n)[one], step=int(rows.steps[row, 0]), ref_step=int(rows.steps[row, 1]),
            c_ref=rows.table[row, 8].item(), known=known[one],
            **{k: t[one] for k, t in options.items()},
        )  # fmt: skip
        assert torch.equal(own[0][one], expected[0])
        assert torch.equal(own[1][one], expected[1])


@pytest.mark.parametrize("update", [native.sampler_update_, emulated_update_])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc4", "nhwc8", "nhwc16"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_next_input_and_zeros_behind_it(dtype, layout, update):
    shape = (3, 3, 4, 8)
    x, f = field(*shape), laid_out(field(*shape, seed=1), layout, dtype)
    for whole in (False, True):  # a view of the first channels, and the padded map itself
        net_input = laid_out(torch.zeros(shape), layout, dtype)
        if whole and layout.startswith("nhwc"):
            width = net_input.stride(3)
            net_input = net_input.as_strided((3, width, 4, 8), net_input.stride())
        state = x.clone()
        rows = some_rows()
        update(state, f, None, rows, seeds=seeds(3), samples=keys(3), net_input=net_input)
        scale, shift = rows.table[0, 9:11].double()
        assert torch.equal(net_input[:, :3], (scale * state.double() + shift).float().to(dtype))
        everything_written = held_by(net_input).view(dtype)
        assert everything_written.isfinite().all()
        assert everything_written.count_nonzero() <= 3 * 3 * 4 * 8


@pytest.mark.parametrize("update", [native.sampler_update_, emulated_update_])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_samples_are_flagged(bad, layout, update):
    x, f = field(3, 3, 4, 8), laid_out(field(3, 3, 4, 8, seed=1), layout, torch.float32)
    flags = torch.zeros(3, dtype=torch.int32)
    options = {"seeds": seeds(3), "samples": keys(3), "nonfinite": flags}
    update(x.clone(), f, None, some_rows(), **options)
    assert flags.tolist() == [0, 0, 0]
    f[1, 2, -1, -1] = bad
    for _ in range(2):  # it accumulates
        update(x.clone(), f, None, some_rows(), **options)
        assert flags.tolist() == [0, 1, 0]
        f[1, 2, -1, -1] = 0.0


@pytest.mark.parametrize("layout", ["nchw", "nhwc8"])
@pytest.mark.parametrize("shape", [(4, 3, 4, 8), (4, 3, 3, 5)], ids=str)
def test_split_batches_give_the_same_samples(shape, layout):
    x, f = field(*shape), laid_out(field(*shape, seed=1), layout, torch.bfloat16)
    whole = x.clone()
    emulated_update_(whole, f, None, some_rows(), seeds=seeds(4), samples=keys(4))
    for i in (0, 3):
        one = slice(i, i + 1)
        alone = x[one].clone()
        emulated_update_(
            alone, f[one], None, some_rows(), seeds=seeds(4)[one], samples=keys(4)[one]
        )
        assert torch.equal(alone, whole[one])


def test_advance_walks_the_table():
    x, f = field(2, 3, 4, 4), field(2, 3, 4, 4, seed=1)
    rows, options = some_rows(), {"seeds": seeds(2), "samples": keys(2)}
    for k in range(6):
        before, fresh = x.clone(), some_rows()
        fresh.counter.fill_(k)
        native.sampler_update_(x, f, None, rows, **options)
        native.advance(rows)
        native.sampler_update_(before, f, None, fresh, **options)
        assert torch.equal(x, before)
        assert rows.counter.item() == k + 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).half()}, TypeError, "x must be torch.float32"),
        ({"x": torch.zeros(2, 4, 4, 3).permute(0, 3, 1, 2)}, ValueError, "x must be contiguous"),
        ({"x": torch.zeros(3, 4, 4)}, ValueError, r"x must be \(B, C, H, W\)"),
        ({"f": torch.zeros(2, 3, 4, 5)}, ValueError, r"f must have the shape of x \(2, 3, 4, 4\)"),
        ({"f": torch.zeros(2, 3, 4, 4).int()}, TypeError, "float16"),
        ({"f": torch.zeros(2, 3, 4, 8)[..., :4]}, ValueError, "contiguous or channels-last"),
        ({"h": torch.zeros(2, 3, 4, 4).double()}, TypeError, "h must be torch.float32"),
        ({"h": torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)}, ValueError, "h must be contiguous"),
        ({"samples": torch.arange(3)}, ValueError, r"samples must have shape \(2,\)"),
        ({"samples": keys(2).int()}, TypeError, "samples must be torch.int64"),
        ({"samples": torch.tensor([0, 2**32])}, ValueError, r"samples\[1\] = 4294967296"),
        ({"seeds": torch.tensor([-1, 0])}, ValueError, r"seeds\[0\] = -1"),
        ({"mask": torch.ones(2, 3, 4, 4).bool()}, ValueError, "come together"),
        ({"noise_weights": torch.ones(2)}, ValueError, r"shape \(2, 2\)"),
        ({"net_input": torch.ones(2, 2, 4, 4)}, ValueError, "net_input"),
        ({"nonfinite": torch.zeros(2)}, TypeError, "int32"),
        ({"rows": some_rows()._replace(counter=torch.zeros(1))}, TypeError, "rows.counter"),
        ({"rows": some_rows()._replace(table=torch.zeros(4, 7))}, ValueError, "rows.table"),
    ],
)
def test_refusals(change, error, text):
    x = torch.zeros(2, 3, 4, 4)
    arguments = {"x": x, "f": x, "h": None, "rows": some_rows(), "seeds": seeds(2)}
    with pytest.raises(error, match=text):
        native.sampler_update_(**(arguments | {"samples": keys(2)} | change))
