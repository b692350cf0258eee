"""Samplers as tables: their coefficients, and the loop that runs them."""

import dataclasses
import math

import golden
import numpy as np
import pytest
import torch

from ncsn_fast import ModelConfig, ScoreModel, noise, sigmas
from ncsn_fast.engines.cpu import CpuEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.noise import Stream
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.editing import inpainting, interpolation_weights
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed, refine_ladder
from ncsn_fast.samplers.program import Chains, InjectedNoise, Program, initial_state, run, table

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
        chains.mask = (torch.arange(draws.shape[3]) < draws.shape[3] // 2).expand_as(x)
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
            assert program.coefficients(k) == pytest.approx(expected, rel=1e-12)
            k += 1
    if denoise:
        assert (program.sigma[k], program.level[k]) == (LADDER[-1], len(LADDER))
        assert program.coefficients(k) == (1, LADDER[-1], 0, 0, 0, 0)
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


@pytest.mark.parametrize(
    ("sigma_begin", "n", "n_sigma", "epsilon", "beta"),
    [(50, 232, 1, 5.6e-6, 0.2016589), (50, 232, 5, 1.1e-6, 0.0857111)],
)
def test_released_consistent_steps(sigma_begin, n, n_sigma, epsilon, beta):
    ladder = refine_ladder(np.geomspace(sigma_begin, 0.01, n), n_sigma)
    program = consistent_annealed(ladder, epsilon / 0.01**2)
    assert program.nfe == (n - 1) * n_sigma + 1
    np.testing.assert_allclose(program.c[:-1] / ladder[1:], beta, atol=5e-8)


def test_the_default_consistent_step_is_the_released_one():
    model = ScoreModel(ModelConfig(ngf=1))
    program = methods.build("cas", model, None, {})
    assert program.b[0] / program.sigma[0] * 0.01**2 == pytest.approx(5.6e-6, rel=1e-3)


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


def test_scaled_is_the_same_sampler_for_a_network_of_another_unit():
    rng = np.random.default_rng(0)
    program = by_hand(rng)
    scale = rng.uniform(0.5, 2, program.nfe)
    scaled = program.scaled(scale)
    for column in ("b", "q"):
        np.testing.assert_array_equal(getattr(scaled, column), getattr(program, column) * scale)
    for column in ("a", "g", "c", "p", "sigma"):
        np.testing.assert_array_equal(getattr(scaled, column), getattr(program, column))


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


@pytest.fixture(scope="module")
def models():
    config = ModelConfig(
        image_size=(8, 8), ngf=2, n_sigmas=6, sigma_begin=3, sigma_end=0.1, epsilon=4e-4
    )
    torch.manual_seed(0)
    v1 = dataclasses.replace(config, arch="ncsn", langevin_form="paper")
    return {"ncsnv2": ScoreModel(config), "ncsn": ScoreModel(v1)}


def same(a: Program, b: Program) -> bool:
    columns = ("sigma", "a", "b", "c", "g", "p", "q")
    return all(np.allclose(getattr(a, c), getattr(b, c), rtol=1e-9, atol=0) for c in columns)


def test_ald_takes_the_models_settings(models):
    model = models["ncsnv2"]
    expected = annealed_langevin(model.sigmas.double(), 4e-4, 5)
    assert same(methods.build("ald", model, None, {}), expected)
    assert same(methods.build("ald", model, 6, {}), expected)
    paper = annealed_langevin(model.sigmas.double(), 4e-4, 5, form="paper")
    assert same(methods.build("ald", models["ncsn"], None, {}), paper)
    assert same(methods.build("ald", models["ncsn"], None, {"form": "code"}), expected)


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_another_ladder_gets_its_step_from_technique_4(models, arch):
    """Whatever form the step is stated in, the chain is the same: x + alpha s + sqrt(2 alpha) z."""
    program = methods.build("ald", models[arch], 3, {"n_steps_each": 2})
    own = models[arch].sigmas.double().numpy()
    ladder = np.geomspace(own[0], own[-1], 3)
    expected = annealed_langevin(ladder, sigmas.epsilon_for(ladder, 2), 2)
    assert same(program, expected)
    assert program.nfe == 7


def test_a_given_epsilon_is_taken_as_it_is(models):
    options = {"epsilon": 1e-3, "n_steps_each": 1, "denoise": False}
    program = methods.build("ald", models["ncsnv2"], None, options)
    assert same(
        program, annealed_langevin(models["ncsnv2"].sigmas.double(), 1e-3, 1, denoise=False)
    )


def test_one_step_is_one_level(models):
    options = {"n_steps_each": 1, "epsilon": 0.9}
    ald = methods.build("ald", models["ncsnv2"], 1, options)
    assert (ald.nfe, ald.sigma[0]) == (2, pytest.approx(3.0))
    own = methods.build("ald", models["ncsnv2"], 1, {"n_steps_each": 2})
    assert own.b[0] / own.sigma[0] == pytest.approx(4e-4 / 0.1**2, rel=1e-5)  # the model's share
    cas = methods.build("cas", models["ncsnv2"], 1, {})
    assert (cas.nfe, cas.sigma[0]) == (1, pytest.approx(3.0))


@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_short_ladders_get_a_step(models, steps, t):
    options = {"n_steps_each": t, "denoise": False, "form": "code"}
    program = methods.build("ald", models["ncsnv2"], steps, options)
    eta = program.b / program.sigma
    assert ((eta > 1e-4) & (eta < 1)).all()


def test_cas_options(models):
    model = models["ncsnv2"]
    own = model.sigmas.double().numpy()
    refined = methods.build("cas", model, None, {"n_sigma": 3, "epsilon": 0.005, "denoise": False})
    assert same(
        refined, consistent_annealed(refine_ladder(own, 3), 0.005 / own[-1] ** 2, denoise=False)
    )
    user = methods.build("cas", model, None, {"sigmas": [2.0, 1.0, 0.5]})
    assert same(user, consistent_annealed([2.0, 1.0, 0.5]))


@pytest.mark.parametrize(
    ("method", "steps", "options", "words"),
    [
        ("no", None, {}, "method must be one of ald, cas, euler, .*; got 'no'"),
        ("cas", None, {"n_steps_each": 2}, "'cas' has no option n_steps_each; it has sigmas, n_s"),
        ("ald", None, {"model": 3}, "'ald' has no option model; it has"),
        ("ald", 0, {}, "steps must be at least 1; got 0"),
        ("ald", 3, {"sigmas": [2, 1]}, "either steps or sigmas, not both"),
        ("ald", None, {"sigmas": [1, 2]}, "sigmas must be descending"),
    ],
)
def test_bad_requests_are_refused(models, method, steps, options, words):
    with pytest.raises(ValueError, match=words):
        methods.build(method, models["ncsnv2"], steps, options)


@pytest.mark.parametrize(("arch", "steps", "warns"), [
    ("ncsn", 4, True), ("ncsn", None, False), ("ncsnv2", 4, False),
])  # fmt: skip
def test_untrained_levels_of_a_conditional_network_are_told(models, caplog, arch, steps, warns):
    methods.build("cas", models[arch], steps, {})
    assert ("knows its 6 trained sigmas only" in caplog.text) == warns
