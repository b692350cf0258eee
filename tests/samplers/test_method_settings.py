"""Methods built for a model: which settings they take from it, and which from the caller."""

import dataclasses

import numpy as np
import pytest
import torch

from ncsn_fast import ModelConfig, ScoreModel
from ncsn_fast.diffusion import schedule
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed, refine_ladder
from ncsn_fast.samplers.program import Program


def test_the_default_consistent_step_is_the_released_one():
    model = ScoreModel(ModelConfig(ngf=1))
    program = methods.build("cas", model, None, {})
    assert program.b[0] / program.sigma[0] * 0.01**2 == pytest.approx(5.6e-6, rel=1e-3)


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
    expected = annealed_langevin(ladder, schedule.epsilon_for(ladder, 2), 2)
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
        ("no", None, {}, "method must be one of ald, fast, cas, euler, .*; got 'no'"),
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
