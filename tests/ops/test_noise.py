"""The noise contract: known answers, three implementations against each other, and statistics."""

import math

import numpy as np
import philox_numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncsn_fast import _C, ops
from ncsn_fast.ops import extension, noise
from ncsn_fast.ops.addresses import array

LEVELS = _C.isa_levels()
UINT32 = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))

# Published with Random123 (kat_vectors, philox4x32 10): counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_random123_known_answers(counter, key, answer):
    by_torch = noise.philox4x32(
        tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key)
    )
    by_numpy = philox_numpy.philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert tuple(int(w) for w in by_torch) == answer
    assert tuple(int(w) for w in by_numpy) == answer


def test_kernel_known_answer():
    words = extension.words(0, torch.tensor([0]), stream=0, step=0, numel=4)
    assert tuple(words.flatten().tolist()) == KNOWN_ANSWERS[0][2]


@settings(max_examples=40, deadline=None)
@given(
    seed=UINT32,
    samples=st.lists(UINT32, min_size=1, max_size=3),
    stream=st.one_of(st.integers(0, 5), UINT32),
    step=UINT32,
    numel=st.integers(1, 1100),
)
def test_words_and_uniforms_agree_bit_for_bit(seed, samples, stream, step, numel):
    index = torch.tensor(samples)
    by_numpy = philox_numpy.words(seed, samples, stream, step, numel)
    by_torch = noise.words(seed, index, stream, step, numel)
    assert np.array_equal(by_torch.numpy(), by_numpy)
    uniform_numpy = philox_numpy.uniform(seed, samples, stream, step, numel)
    assert np.array_equal(noise.uniform(seed, index, stream, step, (numel,)), uniform_numpy)
    for isa, level in enumerate(LEVELS):
        by_kernel = extension.words(seed, index, stream, step, numel, isa)
        assert np.array_equal(by_kernel.numpy(), by_numpy)
        with ops.isa(level):
            by_kernel = ops.uniform(seed, index, stream, step, (numel,))
        assert np.array_equal(by_kernel, uniform_numpy)


@pytest.mark.parametrize("name", ["seed", "stream", "step"])
@pytest.mark.parametrize("value", [-1, 2**32, 2**40])
@pytest.mark.parametrize("module", [noise, ops])
def test_more_than_32_bits_are_refused(module, name, value):
    arguments = {"seed": 1, "samples": torch.tensor([0]), "stream": 0, "step": 0, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 2\*\*32\); got {value}"):
        module.normal(**arguments, shape=(4,))


@pytest.mark.parametrize("value", [-1, 2**32])
def test_sample_indices_beyond_32_bits_are_refused(value):
    with pytest.raises(ValueError, match=rf"samples\[1\] = {value}"):
        ops.normal(1, torch.tensor([0, value]), 0, 0, (4,))


def extreme_words() -> np.ndarray:
    """Pairs of words around every boundary of Box-Muller, crossed, and many random ones."""
    edges = [0, 1, 255, 256, 511, 2**31, 2**32 - 256, 2**32 - 257, 2**32 - 1]
    # u1 next to sqrt(1/2), where the logarithm changes its exponent; u2 next to every eighth turn.
    edges += [int(0.5**0.5 * 2**32) + k * 256 for k in range(-3, 4)]
    edges += [(eighth << 29) % 2**32 + k * 256 for eighth in range(9) for k in (0, 1, 2, 5)]
    edges += [((eighth << 29) - k * 256) % 2**32 for eighth in range(9) for k in (1, 2, 5)]
    edges += [1 << b for b in range(8, 32)] + [2**32 - (1 << b) for b in range(8, 32)]
    first, second = np.meshgrid(edges, edges, indexing="ij")
    crossed = np.stack((first, second), axis=-1).reshape(-1)
    random = np.random.default_rng(0).integers(0, 2**32, 2 * 1_000_000)
    return np.concatenate((crossed, random)).astype(np.uint32)


def kernel_box_muller(words: np.ndarray, isa: int) -> np.ndarray:
    given = torch.from_numpy(words.view(np.int32))
    out = torch.empty(given.shape, dtype=torch.float32)
    arrays = (array("normals", t, tuple(given.shape), t.dtype) for t in (out, given))
    _C.box_muller(*arrays, words.size // 2, isa)
    return out.numpy()


def test_normals_are_within_2_ulp_of_float64_at_every_level():
    words = extreme_words()
    exact = philox_numpy.box_muller(words)
    by_level = [kernel_box_muller(words, isa) for isa in range(len(LEVELS))]
    for values in by_level:
        assert np.array_equal(values.view(np.uint32), by_level[0].view(np.uint32))
    # The contract allows 4; what is rounded once is the reference.
    assert philox_numpy.ulp_distance(by_level[0], exact.astype(np.float32)).max() <= 2
    assert np.abs(by_level[0]).max() <= 5.77


def test_zeros_of_sine_and_cosine_are_zeros():
    quarter_turns = np.array([0, 1 << 30, 2 << 30, 3 << 30], np.uint32)
    words = np.stack((np.full(4, 12345 << 8, np.uint32), quarter_turns), axis=-1).reshape(-1)
    cosine, sine = kernel_box_muller(words, -1).reshape(4, 2).T
    assert (cosine[[1, 3]] == 0).all()
    assert (sine[[0, 2]] == 0).all()
    even, odd = torch.from_numpy(words.astype(np.int64)).view(-1, 2).T
    by_torch = noise.box_muller(even, odd)
    assert np.array_equal(by_torch[0].numpy() == 0, cosine == 0)
    assert np.array_equal(by_torch[1].numpy() == 0, sine == 0)


def test_normals_agree_with_torch():
    samples = torch.tensor([0, 7, 2**32 - 1])
    ours = ops.normal(2**32 - 1, samples, noise.Stream.INITIAL, 99, (3, 37, 41))
    plain = noise.normal(2**32 - 1, samples, noise.Stream.INITIAL, 99, (3, 37, 41))
    assert ours.shape == plain.shape == (3, 3, 37, 41)
    assert philox_numpy.ulp_distance(ours.numpy(), plain.numpy()).max() <= 2
    with ops.backend("reference"):
        assert torch.equal(ops.normal(2**32 - 1, samples, 1, 99, (3, 37, 41)), plain)


def test_empty_batch_and_shape():
    assert ops.normal(1, torch.zeros(0, dtype=torch.int64), 0, 0, (3, 4)).shape == (0, 3, 4)
    assert ops.uniform(1, torch.tensor([3]), 0, 0, (0,)).shape == (1, 0)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_independent_of_batch_position_and_threads(set_threads):
    samples = torch.arange(40)
    together = ops.normal(5, samples, 0, 3, (3, 33, 31))
    alone = torch.cat([ops.normal(5, samples[i : i + 1], 0, 3, (3, 33, 31)) for i in range(40)])
    assert torch.equal(together, alone)
    for n in (1, 2, 3):
        set_threads(n)
        assert torch.equal(ops.normal(5, samples, 0, 3, (3, 33, 31)), together)


# Statistics. Draws are fixed, so these either always hold or never; bands are 5 standard errors.
DRAWS = 1 << 22
BAND = 5.0


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    return ops.normal(2024, torch.arange(64), 0, 0, (DRAWS // 64,)).numpy().astype(np.float64)


def test_moments(draws):
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((draws**power).mean() - mean) < BAND * math.sqrt(variance / DRAWS)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_tails(draws, threshold):
    p = math.erfc(threshold / math.sqrt(2)) / 2
    for count in ((draws > threshold).sum(), (draws < -threshold).sum()):
        assert abs(count - DRAWS * p) < BAND * math.sqrt(DRAWS * p * (1 - p))


def test_largest_normal_is_bounded(draws):
    assert 4.5 < np.abs(draws).max() <= math.sqrt(2 * 24 * math.log(2)) * (1 + 1e-6)


def test_uniforms_fill_the_interval():
    u = ops.uniform(9, torch.arange(16), 0, 0, (1 << 16,)).numpy()
    counts = np.bincount((u.reshape(-1) * 256).astype(int), minlength=256)
    expected = u.size / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(chi_squared - 255) < BAND * math.sqrt(2 * 255)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean product in standard errors."""
    return float(abs((a * b).mean()) * math.sqrt(a.size))


def test_elements_are_uncorrelated(draws):
    for lag in (1, 2, 3, 4, 5, 32, 1024):
        assert correlation(draws[:, lag:], draws[:, :-lag]) < BAND
        assert correlation(draws[:, lag:] ** 2 - 1, draws[:, :-lag] ** 2 - 1) / 2 < BAND


def test_samples_steps_streams_and_seeds_are_uncorrelated(draws):
    assert correlation(draws[1:], draws[:-1]) < BAND
    samples, shape = torch.arange(64), (DRAWS // 64,)
    for seed, stream, step in ((2024, 0, 1), (2024, 1, 0), (2025, 0, 0), (2024, 3, 0)):
        other = ops.normal(seed, samples, stream, step, shape).numpy().astype(np.float64)
        assert correlation(draws, other) < BAND
