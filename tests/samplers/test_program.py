"""The loop that runs a program: its rows, its noise, known pixels, interruption."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ncsn_fast.diffusion.parameterisation import LinearForm
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed
from ncsn_fast.samplers.program import Chains, initial_state, run, table
from ncsn_fast.samplers.program_transforms import inpainting, interpolation_weights

LADDER = [5.0, 1.7, 0.4, 0.1]
EPSILON = 3e-4


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("variant", [None, "ncsnv2", "ncsn"])
def test_no_langevin_steps(variant, denoise):
    program = annealed_langevin(LADDER, EPSILON, 0, denoise=denoise)
    if variant:
        program = inpainting(program, variant)
    x = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    known, mask = torch.rand_like(x), torch.eye(3, dtype=torch.bool).expand_as(x)
    chains = Chains(x=x.clone(), seed=1, samples=torch.arange(2), mask=mask, known=known)
    start = x if variant is None else None
    out = run(program, lambda x, k: -x, chains)
    assert program.nfe == int(denoise)
    assert [list(rows) for rows in program.level_rows()] == ([[0]] if denoise else [])
    assert program.level.tolist() == [0] * program.nfe
    if start is not None:
        torch.testing.assert_close(out, x * (1 - 0.1 * denoise))
    elif denoise:
        assert torch.equal(out[mask], known[mask])


def test_levels_are_consecutive_runs_of_rows():
    program = annealed_langevin(LADDER, EPSILON, 3)
    rows = [list(r) for r in program.level_rows()]
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12]]


def test_of_network_is_the_same_sampler_for_any_parameterisation():
    """The table run on F gives what the table run on f = skip x + out F(scale x + shift) gives."""
    rng = np.random.default_rng(0)
    program = by_hand(rng)
    form = LinearForm(*rng.uniform(-1, 1, (5, program.nfe)))
    raw = lambda u, k: torch.tanh(u * (1 + 0.1 * k))  # noqa: E731

    def f(x, k):
        skip, out, const, scale, shift = (column[k] for column in form)
        return skip * x + out * raw(scale * x + shift, k) + const

    results = []
    for table_, network_ in ((program, f), (program.of_network(form), raw)):
        chains = Chains(torch.ones(2, 1, 2, 3, dtype=torch.float64), 0, torch.arange(2))
        results.append(run(table_, network_, chains))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def by_hand(rng, k=7):
    """A program that no sampler is: every coefficient different, and a history."""
    draw = {name: rng.uniform(-0.9, 0.9, k) for name in "abcgpq"}
    draw["c"][3] = 0.0
    level = np.array([0, 0, 1, 2, 2, 2, 3])
    return table("by hand", np.geomspace(2, 0.1, k), level, **draw)


def network(x, k):
    """Stands for a network: non-linear, and different in every row."""
    return torch.tanh(x * (1 + 0.1 * k)) - 0.2 * k


def edit(program, n=3):
    """The program and chains that use everything: history, mask, known pixels, two noises."""
    generator = torch.Generator().manual_seed(4)
    shape = (n, 2, 3, 5)
    chains = Chains(
        x=torch.randn(shape, generator=generator),
        seed=2**32 - 1,
        samples=torch.tensor([2**32 - 1, 0, 17])[:n],
        noise_weights=interpolation_weights(n),
        mask=torch.rand(shape, generator=generator) < 0.3,
        known=torch.randn(shape, generator=generator),
    )
    return inpainting(program, "ncsn"), chains


def reference_loop(program, chains):
    """x and h by a plain float64 loop; noise from its definition."""
    x, shape = chains.x.double(), tuple(chains.x.shape[1:])
    h = torch.zeros_like(x)

    def draw(stream, step):
        return noise.normal(chains.seed, chains.samples, stream, step, shape).double()

    def impose(x, k):
        scale, step = program.imposition(k)
        if math.isnan(scale):
            return x
        return torch.where(chains.mask, chains.known + scale * draw(Stream.REFERENCE, step), x)

    w = chains.noise_weights.double()[:, :, None, None, None]
    x = impose(x, 0)
    for k in range(program.nfe):
        f = network(x, k)
        z = w[:, 0] * draw(Stream.SAMPLER, k) + w[:, 1] * draw(Stream.SECOND, k)
        x, h = (
            program.a[k] * x + program.b[k] * f + program.g[k] * h + program.c[k] * z,
            program.p[k] * x + program.q[k] * f,
        )
        x = impose(x, k + 1)
    return x, h


def test_a_program_with_history_is_its_recursion():
    program, chains = edit(by_hand(np.random.default_rng(1)))
    x, h = reference_loop(program, chains)
    start = chains.x.clone()
    run(program, network, chains)
    torch.testing.assert_close(chains.x.double(), x, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(chains.h.double(), h, rtol=1e-5, atol=2e-6)
    assert program.has_history
    without = dataclasses.replace(program, g=np.zeros(program.nfe))
    again = dataclasses.replace(chains, x=start, h=None)
    assert not torch.allclose(run(without, network, again), chains.x, atol=1e-2)
    assert again.h is None


class Stop(Exception):
    """A run that was killed."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: edit(by_hand(np.random.default_rng(2))),
        lambda: edit(annealed_langevin(LADDER, EPSILON, 2)),
        lambda: edit(consistent_annealed(np.geomspace(4, 0.1, 6))),
    ],
    ids=["history", "ald", "cas"],
)
def test_an_interrupted_run_resumes_bit_for_bit_at_every_row(make):
    program, chains = make()
    run(program, network, chains)
    for stop in range(program.nfe):
        program, killed = make()

        def dying(x, k, stop=stop):
            if k == stop:
                raise Stop
            return network(x, k)

        with pytest.raises(Stop):
            run(program, dying, killed)
        saved = {"x": killed.x.clone(), "h": None if killed.h is None else killed.h.clone()}
        _, resumed = make()
        resumed = dataclasses.replace(resumed, **saved)
        levels = []
        # Row 0 is the start itself: known pixels, imposed before it, are imposed again alike.
        run(program, network, resumed, start=stop, on_level=levels.append)
        assert torch.equal(resumed.x, chains.x)
        assert (resumed.h is None and chains.h is None) or torch.equal(resumed.h, chains.h)
        assert levels == [r.stop for r in program.level_rows() if r.stop > stop]


def test_a_finished_run_is_left_alone():
    program, chains = edit(by_hand(np.random.default_rng(2)))
    x = chains.x.clone()
    run(program, network, chains, start=program.nfe, on_level=lambda done: pytest.fail("ran"))
    assert torch.equal(chains.x, x)


@pytest.mark.parametrize("restore", [False, True])
def test_2019_inpainting_draws_the_reference_once_per_level(restore):
    """Known pixels are one noised reference during a level: before its first step, after each."""
    program = inpainting(annealed_langevin(LADDER, EPSILON, 3), "ncsn", restore=restore)
    generator = torch.Generator().manual_seed(0)
    x, known = torch.randn(2, 2, 1, 4, 4, generator=generator)
    mask = torch.rand(2, 1, 4, 4, generator=generator) < 0.5
    samples, seen = torch.tensor([3, 9]), []
    chains = Chains(x=x.clone(), seed=5, samples=samples, mask=mask, known=known)

    def watching(x, k):
        seen.append(x[mask].clone())
        return network(x, k)

    run(program, watching, chains)
    per_level = []
    for level, rows in enumerate(program.level_rows()):
        sigma = LADDER[min(level, 3)]
        z = noise.normal(5, samples, Stream.REFERENCE, rows.start, (1, 4, 4))
        expected = (known + sigma * z)[mask]
        for k in rows:
            torch.testing.assert_close(seen[k], expected)
        per_level.append(expected)
    assert not torch.allclose(per_level[3], per_level[4])  # same sigma, another draw
    if restore:
        assert torch.equal(chains.x[mask], known[mask])
    else:
        torch.testing.assert_close(chains.x[mask], per_level[-1])


@pytest.mark.parametrize("restore", [False, True])
def test_2020_inpainting_draws_the_reference_before_every_step(restore):
    program = inpainting(annealed_langevin(LADDER, EPSILON, 2), "ncsnv2", restore=restore)
    generator = torch.Generator().manual_seed(0)
    x, known = torch.randn(2, 2, 1, 4, 4, generator=generator)
    mask = torch.rand(2, 1, 4, 4, generator=generator) < 0.5
    samples = torch.tensor([3, 9])
    chains = Chains(x=x.clone(), seed=5, samples=samples, mask=mask, known=known)

    def watching(x, k):
        z = noise.normal(5, samples, Stream.REFERENCE, k, (1, 4, 4))
        torch.testing.assert_close(x[mask], (known + program.sigma[k] * z)[mask])
        return network(x, k)

    run(program, watching, chains)
    assert torch.equal(chains.x[mask], known[mask]) == restore


@pytest.mark.parametrize("n", [1, 2, 9])
def test_interpolation_weights(n):
    w = interpolation_weights(n)
    assert w[0].tolist() == [1, 0]
    torch.testing.assert_close(w.square().sum(1), torch.ones(n))
    angles = torch.atan2(w[:, 1], w[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, n))


@pytest.mark.parametrize("initial", ["uniform", "prior"])
def test_initial_state(initial):
    program = dataclasses.replace(annealed_langevin(LADDER, EPSILON, 1), initial=initial)
    samples = torch.tensor([4, 2**32 - 1])
    x = initial_state(program, 7, samples, (3, 4, 5))
    draw = {"uniform": noise.uniform, "prior": noise.normal}[initial]
    scale = {"uniform": 1.0, "prior": 5.0}[initial]
    expected = scale * draw(7, samples, Stream.INITIAL, 0, (3, 4, 5))
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
