"""Langevin samplers as tables, and the published code's runs with its own noise."""

import math

import golden
import numpy as np
import pytest
import torch

from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed, refine_ladder
from ncsn_fast.samplers.program import Chains, InjectedNoise, run
from ncsn_fast.samplers.program_transforms import inpainting, interpolation_weights

LADDER = [5.0, 1.7, 0.4, 0.1]
EPSILON = 3e-4


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


class Draws:
    """Normals in the order of the published code; those of the reference fill the left half."""

    def __init__(self, meta):
        self.random = np.random.RandomState(meta["noise_seed"])
        self.rows = meta.get("rows", meta.get("batch"))
        self.repeat = meta.get("n_interpolations", 1)
        self.shape = (self.rows, meta["channels"], meta["image_size"], meta["image_size"])

    def __call__(self, stream, step):
        if stream == Stream.REFERENCE:
            half = self.shape[3] // 2
            drawn = self.random.standard_normal((*self.shape[:3], half))
            drawn = np.concatenate((drawn, np.full_like(drawn, math.nan)), axis=3)
        else:
            drawn = self.random.standard_normal(self.shape)
        return torch.from_numpy(drawn.astype(np.float32)).repeat_interleave(self.repeat, dim=0)


def golden_run(name):
    """Model, program (in terms of sigma * score), chains, update and output of a golden run."""
    meta, arrays = golden.read(name)
    model, draws = golden.model(meta), Draws(meta)
    program = annealed_langevin(
        model.sigmas, meta["step_lr"], meta["n_steps_each"], denoise=meta.get("denoise", False)
    )
    x = golden.uniform(meta["x0_seed"], *draws.shape).repeat_interleave(draws.repeat, dim=0)
    chains = Chains(x=x, seed=0, samples=zeros(len(x)))
    if name == "interpolation":
        chains.noise_weights = interpolation_weights(draws.repeat).repeat(draws.rows, 1)
    if name == "inpainting":
        program = inpainting(program, "ncsnv2", restore=False)
        chains.known = golden.uniform(meta["ref_seed"], *draws.shape)
        chains.mask = (torch.arange(draws.shape[3]) < draws.shape[3] // 2).expand_as(x).contiguous()
    return model, program, chains, InjectedNoise(draws), arrays["output"]


@pytest.mark.parametrize("runner", ["loop", EagerEngine, CpuEngine])
@pytest.mark.parametrize(
    "name", ["langevin_denoise", "langevin_noisy", "interpolation", "inpainting"]
)
def test_golden_runs(name, runner):
    model, program, chains, update, expected = golden_run(name)
    if runner == "loop":
        with torch.inference_mode():
            x = run(program, lambda x, k: model(x), chains, update=update)
    else:
        cpu = torch.device("cpu")
        engine = runner(model, device=cpu, dtype="fp32", batch_size=len(chains.x))
        x = engine.run(program, chains, update=update)
    golden.assert_matches(x, expected)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("denoise", [False, True])
def test_annealed_langevin_table(denoise, form):
    program = annealed_langevin(LADDER, EPSILON, 3, denoise=denoise, form=form)
    k = 0
    for level, sigma in enumerate(LADDER):
        alpha = EPSILON * sigma**2 / LADDER[-1] ** 2
        step, noise_scale = (alpha, math.sqrt(2 * alpha))
        if form == "paper":
            step, noise_scale = alpha / 2, math.sqrt(alpha)
        for _ in range(3):
            assert (program.sigma[k], program.level[k]) == (sigma, level)
            expected = (1, step / sigma, 0, noise_scale, 0, 0)
            assert program.coefficients(k)[:6] == pytest.approx(expected, rel=1e-12)
            k += 1
    if denoise:
        assert (program.sigma[k], program.level[k]) == (LADDER[-1], len(LADDER))
        assert program.coefficients(k) == (1, LADDER[-1], 0, 0, 0, 0, 0, 0)
        k += 1
    assert program.nfe == k == len(program.b)
    assert (program.initial, program.has_history) == ("uniform", False)


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("eta", [None, 0.35, 0.75, 1.2])
def test_consistent_annealed_table(eta, denoise):
    ladder = np.geomspace(4.0, 0.05, 12)
    gamma = ladder[1] / ladder[0]
    program = consistent_annealed(ladder, eta, denoise=denoise)
    eta = 1 - gamma**1.563 if eta is None else eta
    beta = math.sqrt(1 - ((1 - eta) / gamma) ** 2)
    assert program.nfe == 12
    np.testing.assert_allclose(program.b[:-1], eta * ladder[:-1], rtol=1e-12)
    np.testing.assert_allclose(program.c[:-1], beta * ladder[1:], rtol=1e-9)
    assert program.b[-1] == pytest.approx(ladder[-1] * (1 if denoise else eta), rel=1e-12)
    assert program.c[-1] == 0
    assert program.level.tolist() == list(range(12))
    assert (program.a == 1).all()


def test_refined_ladder_keeps_the_old_levels():
    ladder = np.geomspace(4.0, 0.05, 6)
    fine = refine_ladder(ladder, 4)
    np.testing.assert_allclose(fine[::4], ladder, rtol=1e-12)
    np.testing.assert_allclose(fine[1:] / fine[:-1], fine[1] / fine[0], rtol=1e-12)
    np.testing.assert_allclose(refine_ladder(ladder, 1), ladder, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: annealed_langevin(LADDER, 0.0, 3), r"expected epsilon > 0 .* got 0.0 and 3"),
        (lambda: annealed_langevin(LADDER, math.nan, 3), "expected epsilon > 0"),
        (lambda: annealed_langevin(LADDER, 1e-5, -1), "got 1e-05 and -1"),
        (lambda: annealed_langevin(LADDER[::-1], 1e-5, 1), "sigmas must be descending"),
        (lambda: annealed_langevin(LADDER, 1e-5, 1, form="book"), "'code' or 'paper'; got 'book'"),
        (lambda: refine_ladder([4, 3, 1], 2), "needs a geometric ladder"),
        (lambda: consistent_annealed([4, 3, 1]), "needs a geometric ladder"),
        (lambda: consistent_annealed([4, 2, 1], 0.4999), r"= \[0.5, 1.5\]; got 0.4999"),
        (lambda: consistent_annealed([4, 2, 1], 1.5001), r"= \[0.5, 1.5\]; got 1.5"),
        (lambda: consistent_annealed([4, 2, 1], math.nan), r"= \[0.5, 1.5\]; got nan"),
        (lambda: refine_ladder(LADDER, 0), "n_sigma must be at least 1; got 0"),
        (lambda: interpolation_weights(0), "n_frames must be at least 1; got 0"),
        (lambda: inpainting(annealed_langevin(LADDER, 1e-5, 1), "v3"), "'ncsnv2' or 'ncsn'"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("eta", [0.5, 1.5])
def test_ends_of_the_validity_window_are_noiseless(eta):
    assert consistent_annealed([4, 2, 1], eta).c.tolist() == [0, 0, 0]


def test_one_sigma():
    ald = annealed_langevin([0.3], 1e-3, 2)
    assert (ald.nfe, ald.sigma.tolist(), ald.level.tolist()) == (3, [0.3] * 3, [0, 0, 1])
    np.testing.assert_allclose(ald.b, [1e-3 / 0.3, 1e-3 / 0.3, 0.3])
    cas = consistent_annealed([0.3])
    assert (cas.nfe, cas.b.tolist(), cas.c.tolist()) == (1, [0.3], [0.0])
