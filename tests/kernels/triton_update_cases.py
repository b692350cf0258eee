"""The sampler update in Triton: the noise contract, and each term against the specification."""

import math

import numpy as np
import philox_numpy
import pytest
import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels import noise as kernels_noise
from ncsn_fast.kernels.rows import Rows
from ncsn_fast.kernels.sampler_update import advance, sampler_update, sampler_update_
from program_rows import rows_of
from torch import Tensor
from triton_common import DEVICE, FLOATS, noise_like

from ncsn_fast.ops import noise, reference
from ncsn_fast.ops.noise import Stream

# In planes; 12 pixels a channel, less than a tile; flat; one element; flat, fewer than 4 pixels;
# too many channels for planes.
SHAPES = [(3, 3, 8, 12), (2, 4, 3, 4), (2, 3, 7, 11), (1, 1, 1, 1), (2, 5, 1, 3), (2, 65, 2, 2)]
FULL = (0.9, 0.37, -0.21, 0.63, 0.11, -1.3, 0.2, -0.7)
SEED, STEP = 2**32 - 1, 77


def field(*shape: int, seed: int = 0) -> Tensor:
    return noise_like(*shape, seed=seed).mul(1.7).sub(0.3).to(DEVICE)


def keys(n: int) -> Tensor:
    return torch.tensor([2**32 - 1, 5, 0, 17])[:n].to(DEVICE)


def close(ours: Tensor | None, exact: Tensor | None) -> bool:
    """A few roundings of numbers below 8."""
    if ours is None or exact is None:
        return ours is exact
    return bool((ours.cpu().double() - exact).abs().max() <= 8 * 2.0**-22)


def exact_update(x, f, h, coefficients, *, step=STEP, seed=SEED, **options):
    """The reference in float64 on the CPU; coefficients as the kernel has them, in float32."""
    rounded = tuple(torch.tensor(coefficients, dtype=torch.float32).double().tolist())
    x, f, h = (t if t is None else t.cpu().double() for t in (x, f, h))
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    if "known" in options:
        options["known"] = options["known"].double()
    return reference.sampler_update(x, f, h, rounded, seed=seed, step=step, **options)


# Noise -------------------------------------------------------------------------------------------


@triton.jit
def noise_kernel(key_ptr, words_ptr, uniform_ptr, normal_ptr, STREAM: tl.constexpr,
                 N: tl.constexpr):  # fmt: skip
    at = tl.arange(0, N)[None, :]
    quad = tl.arange(0, N // 4)[None, :]
    seed, sample, step = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2)
    w0, w1, w2, w3 = kernels_noise.words(seed, sample, step, STREAM, quad)
    words = kernels_noise.in_order(w0, w1, w2, w3, 1, N)
    tl.store(words_ptr + at, words.to(tl.int64))
    tl.store(uniform_ptr + at, kernels_noise.uniform(words))
    tl.store(normal_ptr + at, kernels_noise.normals(seed, sample, step, STREAM, quad, 1, N))


@triton.jit
def box_muller_kernel(even_ptr, odd_ptr, first_ptr, second_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    even = tl.load(even_ptr + at).to(tl.uint32)
    first, second = kernels_noise.box_muller(even, tl.load(odd_ptr + at).to(tl.uint32))
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def ulps(ours: Tensor, expected: Tensor) -> int:
    return int(philox_numpy.ulp_distance(ours.cpu().numpy(), expected.numpy()).max())


@pytest.mark.parametrize(
    ("seed", "sample", "step"), [(0, 0, 0), (42, 7, 1160), (2**32 - 1, 2**32 - 1, 2**32 - 1)]
)
@pytest.mark.parametrize("stream", [Stream.SAMPLER, Stream.SECOND])
def test_noise_contract(stream, seed, sample, step):
    n = 1 << 14
    words = torch.empty(n, dtype=torch.int64, device=DEVICE)
    uniforms, normals = (torch.empty(n, device=DEVICE) for _ in range(2))
    key = torch.tensor([seed, sample, step], device=DEVICE)
    launch.start(
        noise_kernel, 1, key.device, key, words, uniforms, normals, STREAM=int(stream), N=n, warps=4
    )
    samples = torch.tensor([sample])
    expected = noise.words(seed, samples, stream, step, n)
    assert torch.equal(words.cpu(), expected.flatten())
    assert torch.equal(uniforms.cpu(), noise.uniform(seed, samples, stream, step, (n,))[0])
    assert ulps(normals, noise.normal(seed, samples, stream, step, (n,))[0]) <= 4


def test_published_answer():
    """Random123's answer for counter 0 and key 0."""
    words = torch.empty(16, dtype=torch.int64, device=DEVICE)
    rest = [torch.empty(16, device=DEVICE) for _ in range(2)]
    key = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    launch.start(noise_kernel, 1, key.device, key, words, *rest, STREAM=0, N=16, warps=1)
    assert words[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_normals_of_extreme_words():
    ends = [0, 255, 256, 0xFFFFFFFF, 0xFFFFFF00, 0x80000000, 0x7FFFFFFF, 0x40000000]
    ends += [0x20000000, 0x1FFFFFFF, 0x60000000, 0xA0000000, 0xC0000000, 0xE0000000, 3 << 29, 1]
    even, odd = torch.tensor([(a, b) for a in ends for b in ends]).T.contiguous()
    first, second = (torch.empty(256, device=DEVICE) for _ in range(2))
    launch.start(
        box_muller_kernel, 1, first.device, even.to(DEVICE), odd.to(DEVICE), first, second, N=256,
        warps=4,
    )  # fmt: skip
    expected = noise.box_muller(even, odd)
    assert ulps(first, expected[0]) <= 4
    assert ulps(second, expected[1]) <= 4
    assert np.isfinite(first.cpu().numpy()).all()


# One row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [(), (0,), (0, 1, 3), (2, 4), range(6)], ids=str)
def test_every_term(kept, shape):
    coefficients = tuple(v if i in kept else 0.0 for i, v in enumerate(FULL))
    x, f, h = (field(*shape, seed=k) for k in range(3))
    options = {"samples": keys(shape[0])}
    ours = sampler_update(x, f, h, coefficients, seed=SEED, step=STEP, **options)
    exact = exact_update(x, f, h, coefficients, **options)
    assert close(ours[0], exact[0])
    assert close(ours[1], exact[1])


def padded(f: Tensor, width: int = 8) -> Tensor:
    """f as the first channels of a channels-last map whose other channels are NaN."""
    n, c, height, w = f.shape
    memory = torch.full((n, height, w, max(width, c)), math.nan, dtype=f.dtype, device=f.device)
    view = memory.permute(0, 3, 1, 2)
    view[:, :c] = f
    return view[:, :c]


LAYOUTS = {
    "nchw": lambda f: f.contiguous(),
    "nhwc": lambda f: f.contiguous(memory_format=torch.channels_last),
    "padded": padded,
    "padded to 5": lambda f: padded(f, 5),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 7, 3), (2, 1, 4, 4)], ids=str)
def test_network_output_of_any_type_and_layout(shape, layout, dtype):
    x, h = field(*shape), field(*shape, seed=1)
    f = field(*shape, seed=2).to(dtype)
    options = {"seed": SEED, "samples": keys(2), "step": STEP}
    expected = sampler_update(x, f.float(), h, FULL, **options)
    actual = sampler_update(x, LAYOUTS[layout](f), h, FULL, **options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def one_row(row=FULL, c_ref: float = math.nan, step: int = STEP, ref_step: int = 0) -> Rows:
    steps = torch.tensor([[step, ref_step]])
    return rows_of(torch.tensor([row]), torch.tensor([c_ref]), steps, DEVICE)


def seeds(n: int, seed: int = SEED) -> Tensor:
    return torch.full((n,), seed, dtype=torch.int64, device=DEVICE)


INPUTS = {
    "padded to 8": lambda c: (8, torch.channels_last),
    "padded to 5": lambda c: (5, torch.channels_last),
    "padded to 32": lambda c: (32, torch.channels_last),
    "channels-last": lambda c: (c, torch.channels_last),
    "contiguous": lambda c: (c, torch.contiguous_format),
    "contiguous and padded": lambda c: (c + 2, torch.contiguous_format),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 7, 3), (2, 1, 4, 4)], ids=str)
def test_next_network_input(shape, kind, dtype):
    n, c = shape[:2]
    channels, memory_format = INPUTS[kind](c)
    x, f = field(*shape), field(*shape, seed=1)
    net_input = torch.full((n, channels, *shape[2:]), math.nan, dtype=dtype, device=DEVICE)
    net_input = net_input.contiguous(memory_format=memory_format)
    expected, _ = sampler_update(x, f, None, FULL, seed=SEED, samples=keys(n), step=STEP)
    sampler_update_(x, f, None, one_row(), seeds=seeds(n), samples=keys(n), net_input=net_input)
    assert torch.equal(x, expected)
    assert (net_input[:, c:] == 0).all()
    wanted = (2 * x - 1).to(dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates
        torch.testing.assert_close(net_input[:, :c], wanted, rtol=2.0**-7, atol=0)
    else:
        assert torch.equal(net_input[:, :c], wanted)


def test_rows_and_counter():
    """Three rows by replaying the same two launches, then one past the end."""
    shape, n = (2, 3, 4, 6), 2
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(3, 8, generator=generator)
    steps = torch.tensor([[0, 9], [2**32 - 1, 0], [7, 2**31]])
    rows = rows_of(table, torch.tensor([math.nan, 0.5, 0.0]), steps, DEVICE)
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    mask, own_seeds = field(*shape, seed=5) > 0, torch.tensor([3, 2**32 - 1], device=DEVICE)
    options = {"mask": mask, "known": known, "samples": keys(n)}
    exact_x, exact_h = x.cpu().double(), h.cpu().double()
    for k in range(3):
        sampler_update_(x, f, h, rows, seeds=own_seeds, **options)
        advance(rows)
        parts = [
            exact_update(
                exact_x[i : i + 1], f[i : i + 1], exact_h[i : i + 1], tuple(table[k].tolist()),
                seed=int(own_seeds[i]), step=int(steps[k, 0]), c_ref=[math.nan, 0.5, 0.0][k],
                ref_step=int(steps[k, 1]), **{key: t[i : i + 1] for key, t in options.items()},
            )
            for i in range(n)
        ]  # fmt: skip
        exact_x, exact_h = (torch.cat(column) for column in zip(*parts, strict=True))
        scale = 1 + max(exact_x.abs().max().item(), exact_h.abs().max().item())
        assert (x.cpu().double() - exact_x).abs().max() <= 2.0**-20 * scale
        assert (h.cpu().double() - exact_h).abs().max() <= 2.0**-20 * scale
    assert rows.counter.item() == 3
    before = x.clone(), h.clone()
    net_input = torch.full_like(x, math.nan)
    sampler_update_(x, f, h, rows, seeds=own_seeds, net_input=net_input, **options)
    assert torch.equal(x, before[0])
    assert torch.equal(h, before[1])
    assert net_input.isnan().all()


def test_second_noise():
    x, f = field(3, 3, 4, 4), field(3, 3, 4, 4, seed=1)
    weights = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], device=DEVICE)
    options = {"samples": keys(3), "noise_weights": weights}
    ours, _ = sampler_update(x, f, None, FULL, seed=SEED, step=STEP, **options)
    assert close(ours, exact_update(x, f, None, FULL, **options)[0])
    first, _ = sampler_update(x, f, None, FULL, seed=SEED, step=STEP, samples=keys(3))
    assert torch.equal(ours[0], first[0])
    assert not torch.equal(ours[1], first[1])


@pytest.mark.parametrize("c_ref", [math.nan, 0.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 5, 7)], ids=str)
def test_known_pixels(shape, c_ref):
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    mask = field(*shape, seed=5) > 0
    masked = {"mask": mask, "known": known, "c_ref": c_ref, "ref_step": 12, "samples": keys(2)}
    ours, h_ours = sampler_update(x, f, h, FULL, seed=SEED, step=STEP, **masked)
    exact, h_exact = exact_update(x, f, h, FULL, **masked)
    free, _ = sampler_update(x, f, h, FULL, seed=SEED, step=STEP, samples=keys(2))
    assert close(ours, exact)
    assert close(h_ours, h_exact)
    assert torch.equal(ours[~mask], free[~mask])
    if math.isnan(c_ref):
        assert torch.equal(ours, free)
    if c_ref == 0.0:
        assert torch.equal(ours[mask], known[mask])


def test_no_noise_where_its_coefficient_is_zero():
    x, f = field(2, 3, 4, 4), field(2, 3, 4, 4, seed=1)
    row = (1.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    ours, _ = sampler_update(x, f, None, row, seed=0, samples=keys(2), step=0)
    assert torch.equal(ours, x + 0.5 * f)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy: inf - inf
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 3, 8, 12), (3, 3, 5, 7)], ids=str)
def test_nonfinite_samples_are_flagged(shape, bad):
    x, f = field(*shape), field(*shape, seed=1)
    flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    options = {"seeds": seeds(3), "samples": keys(3), "nonfinite": flags}
    sampler_update_(x.clone(), f, None, one_row(), **options)
    assert flags.tolist() == [0, 0, 0]
    f[1, 2, -1, -1] = bad
    sampler_update_(x.clone(), f, None, one_row(), **options)
    assert flags.tolist() == [0, 1, 0]
    sampler_update_(x.clone(), torch.zeros_like(f), None, one_row(), **options)
    assert flags.tolist() == [0, 1, 0]  # it accumulates


@pytest.mark.parametrize("shape", [(4, 3, 4, 8), (4, 3, 3, 5)], ids=str)
def test_split_batches_give_the_same_samples(shape):
    x, f = field(*shape), field(*shape, seed=1)
    options = {"seed": SEED, "step": STEP}
    whole, _ = sampler_update(x, f, None, FULL, samples=keys(4), **options)
    turned, _ = sampler_update(x.flip(0), f.flip(0), None, FULL, samples=keys(4).flip(0), **options)
    assert torch.equal(turned.flip(0), whole)
    for i in (0, 3):
        one = slice(i, i + 1)
        alone, _ = sampler_update(x[one], f[one], None, FULL, samples=keys(4)[one], **options)
        assert torch.equal(alone, whole[one])


def test_empty_batch():
    x = torch.empty(0, 3, 4, 4, device=DEVICE)
    ours, _ = sampler_update(x, x, None, FULL, seed=0, samples=keys(0), step=0)
    assert ours.shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).half()}, ValueError, "x must be contiguous, torch.float32"),
        ({"f": torch.zeros(2, 3, 4, 5)}, ValueError, r"f must have the shape of x \(2, 3, 4, 4\)"),
        ({"f": torch.zeros(2, 3, 4, 4).int()}, TypeError, "float16"),
        ({"f": torch.zeros(2, 3, 4, 8)[..., :4]}, ValueError, "contiguous or channels-last"),
        ({"h": torch.zeros(2, 3, 4, 4).double()}, ValueError, "h must be"),
        ({"samples": torch.arange(3)}, ValueError, r"samples must be .* of shape \(2,\)"),
        ({"mask": torch.ones(2, 3, 4, 4).bool()}, ValueError, "come together"),
        ({"noise_weights": torch.ones(2)}, ValueError, r"shape \(2, 2\)"),
        ({"net_input": torch.ones(2, 2, 4, 4)}, ValueError, "net_input"),
        ({"nonfinite": torch.zeros(2)}, ValueError, "int32"),
    ],
)
def test_refusals(change, error, text):
    x = torch.zeros(2, 3, 4, 4, device=DEVICE)
    arguments = {"x": x, "f": x, "h": None, "rows": one_row(), "seeds": seeds(2)}
    arguments |= {"samples": keys(2)} | {name: t.to(DEVICE) for name, t in change.items()}
    with pytest.raises(error, match=text):
        sampler_update_(**arguments)


def test_rows_refuse_steps_beyond_32_bits():
    with pytest.raises(ValueError, match="steps must be in"):
        one_row(step=2**32)
