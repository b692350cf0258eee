"""Methods by name: their defaults, their options, and what they draw on every engine."""

import dataclasses

import numpy as np
import pytest
import torch
from drawing import tiny
from PIL import Image

import ncsn_fast
from ncsn_fast import ModelConfig, Sampler, ScoreModel, sample
from ncsn_fast.data.images import sample_path, to_uint8
from ncsn_fast.diffusion import spacing
from ncsn_fast.diffusion.sde import VE
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers import few_step, methods
from ncsn_fast.samplers import reverse_sde as chains

NEW = ["fast", "euler", "heun", "dpmpp", "em", "reverse", "ancestral"]
LADDER_METHODS = [name for name in NEW if name != "em"]
COLUMNS = ("sigma", "level", "a", "b", "c", "g", "p", "q")


@pytest.fixture(scope="module")
def models():
    config = ModelConfig(image_size=(8, 8), ngf=2, n_sigmas=60, sigma_begin=30, sigma_end=0.02)
    torch.manual_seed(0)
    return {a: ScoreModel(dataclasses.replace(config, arch=a)) for a in ("ncsnv2", "ncsn")}


def same(a, b):
    return all(np.array_equal(getattr(a, c), getattr(b, c)) for c in COLUMNS)


def own_ladder(model):
    return model.sigmas.double().numpy()


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_default_evaluations(models, arch):
    found = {name: methods.build(name, models[arch], None, {}).nfe for name in NEW}
    expected = {
        "fast": 15,
        "euler": 50,
        "heun": 35,
        "dpmpp": 20,
        "em": 500,
        "reverse": 60,
        "ancestral": 60,
    }
    assert found == expected


def test_defaults_are_the_builders(models):
    model, own = models["ncsnv2"], own_ladder(models["ncsnv2"])

    def spaced(n):
        return spacing.spaced(own, n, "geometric")

    expected = {
        "fast": few_step.fast(spaced(15)),
        "euler": few_step.euler(spaced(50)),
        "heun": few_step.heun(spaced(18)),
        "dpmpp": few_step.dpm_solver_pp(spaced(20), eta=1.0),
        "em": chains.euler_maruyama(VE.from_sigmas(own), 500),
        "reverse": chains.reverse_diffusion(own),
        "ancestral": chains.ancestral(own),
    }
    for name, program in expected.items():
        assert same(methods.build(name, model, None, {}), program), name
        assert program.name == name


def test_options_reach_the_builders(models):
    model, own = models["ncsnv2"], own_ladder(models["ncsnv2"])
    bent = {"schedule": "karras", "rho": 3.0}
    ladder, churn = spacing.karras(own[0], own[-1], 7, 3.0), few_step.Churn(3.0, 0.1, 4.0, 1.1)
    churned = {"churn": 3.0, "s_min": 0.1, "s_max": 4.0, "s_noise": 1.1}
    for name, given, expected in (
        ("euler", {**bent, **churned}, few_step.euler(ladder, churn=churn)),
        ("heun", {**bent, **churned}, few_step.heun(ladder, churn=churn)),
        ("dpmpp", {**bent, "eta": 0.5, "s_noise": 1.2},
         few_step.dpm_solver_pp(ladder, eta=0.5, s_noise=1.2)),
        ("fast", {**bent, "eta": 2.0, "s_noise": 0.9}, few_step.fast(ladder, eta=2.0, s_noise=0.9)),
        ("reverse", {**bent, "flow": True}, chains.reverse_diffusion(ladder, flow=True)),
        ("ancestral", {**bent, "eta": 0.3}, chains.ancestral(ladder, 0.3)),
        ("em", {"t_end": 0.01}, chains.euler_maruyama(VE.from_sigmas(own), 7, t_end=0.01)),
    ):  # fmt: skip
        assert same(methods.build(name, model, 7, given), expected), name


@pytest.mark.parametrize("name", LADDER_METHODS)
def test_ladders_of_every_kind(models, name):
    model, own = models["ncsnv2"], own_ladder(models["ncsnv2"])
    user = methods.build(name, model, None, {"sigmas": [5.0, 1.0, 0.1]})
    assert user.sigma[0] == 5.0
    assert set(user.sigma.tolist()) == {5.0, 1.0, 0.1}
    for schedule in ("ladder", "geometric", "karras", "polynomial"):
        program = methods.build(name, model, 9, {"schedule": schedule})
        expected = spacing.spaced(own, 9, schedule)
        np.testing.assert_array_equal(np.unique(program.sigma), expected[::-1])
    assert methods.build(name, model, 1, {}).nfe == 1
    assert methods.build(name, model, 9, {"denoise": False}).nfe in (8, 9, 16)


@pytest.mark.parametrize("name", LADDER_METHODS)
def test_conditional_networks_are_asked_at_trained_levels(models, name, caplog):
    own = own_ladder(models["ncsn"])
    for steps in (None, 1, 7, 59, 60):
        assert np.isin(methods.build(name, models["ncsn"], steps, {}).sigma, own).all()
    assert not caplog.text
    methods.build(name, models["ncsn"], 61, {})
    methods.build(name, models["ncsn"], 7, {"schedule": "karras"})
    assert caplog.text.count("knows its 60 trained sigmas only") == 2


def test_short_ladders_of_conditional_networks_bound_the_default_steps():
    config = ModelConfig(arch="ncsn", image_size=(8, 8), ngf=2, n_sigmas=10, sigma_begin=1)
    program = methods.build("dpmpp", ScoreModel(config), None, {})
    np.testing.assert_allclose(program.sigma, np.geomspace(1, 0.01, 10), rtol=1e-6)


@pytest.mark.parametrize("name", LADDER_METHODS)
def test_a_model_of_one_level(name):
    one = ScoreModel(ModelConfig(image_size=(8, 8), ngf=2, n_sigmas=1, sigma_begin=0.4))
    program = methods.build(name, one, None, {})
    assert (program.nfe, program.sigma[0]) == (1, pytest.approx(0.4))
    images = Sampler(one, engine="eager").sample(2, method=name, progress=False)
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("method", "steps", "options", "words"),
    [
        ("heun", 0, {}, "steps must be at least 1; got 0"),
        ("em", 0, {}, "steps must be at least 1; got 0"),
        ("dpmpp", -3, {}, "steps must be at least 1; got -3"),
        ("dpmpp", 3, {"schedule": "cosine"}, "schedule must be one of ladder, geometric"),
        ("dpmpp", 3, {"schedule": "karras", "rho": 0}, "rho must be positive; got 0"),
        ("dpmpp", 3, {"rho": 2.0}, "'geometric' has no rho; karras and polynomial have"),
        ("dpmpp", 61, {"schedule": "ladder"}, "'ladder' has 1 to 60 steps"),
        ("dpmpp", None, {"sigmas": [1.0, 2.0]}, "sigmas must be descending"),
        ("dpmpp", 2, {"sigmas": [2.0, 1.0]}, "give no steps, schedule or rho with them"),
        ("heun", None, {"sigmas": [2.0, 1.0], "rho": 3.0}, "give no steps, schedule or rho"),
        ("heun", 1, {"denoise": False}, "leave no step; give more steps"),
        ("heun", 3, {"churn": -1.0}, "churn and s_noise must be at least 0"),
        ("dpmpp", 3, {"churn": 1.0}, "'dpmpp' has no option churn; it has sigmas, schedule, rho"),
        ("em", 3, {"schedule": "karras"}, "'em' has no option schedule; it has t_end, denoise"),
        ("ancestral", 3, {"eta": -1.0}, "eta must be at least 0; got -1"),
    ],
)
def test_bad_requests_are_refused(models, method, steps, options, words):
    with pytest.raises(ValueError, match=words):
        methods.build(method, models["ncsnv2"], steps, options)


def plain(program, model, seed, samples):
    """The table run in float64 with ScoreModel.score for the network."""
    shape, sigma = model.image_shape, program.sigma
    x = sigma[0] * noise.normal(seed, samples, Stream.INITIAL, 0, shape).double()
    h = torch.zeros_like(x)
    for k in range(program.nfe):
        a, b, g, c, p, q, _, _ = program.coefficients(k)
        with torch.no_grad():
            f = sigma[k] * model.score(x.float(), float(sigma[k])).double()
        z = noise.normal(seed, samples, Stream.SAMPLER, k, shape).double()
        x, h = a * x + b * f + g * h + c * z, p * x + q * f
    return x


OPTIONS = {
    "euler": {"steps": 4},
    "heun": {"steps": 3, "schedule": "karras"},
    "heun-churned": {"method": "heun", "steps": 3, "churn": 1.5},
    "fast": {"steps": 4},
    "dpmpp": {"steps": 4, "schedule": "polynomial"},
    "dpmpp-flow": {"method": "dpmpp", "steps": 4, "eta": 0.0},
    "em": {"steps": 5},
    "reverse": {"steps": 4},
    "ancestral": {"steps": 3},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_engine_draws_what_the_formulas_say(sampler, case):
    options = {"method": case, **OPTIONS[case]}
    states = {}

    def keep(progress):
        for i, x in zip(progress.samples.tolist(), progress.x, strict=True):
            states[i] = x

    images = sampler.sample(4, seed=9, progress=False, callback=keep, **options)
    arguments = {k: v for k, v in options.items() if k not in ("method", "steps")}
    program = methods.build(options["method"], sampler.model, options["steps"], arguments)
    expected = plain(program, sampler.model, 9, torch.arange(4))
    found = torch.stack([states[i] for i in range(4)]).double()
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
    assert sampler.report.nfe == program.nfe
    assert torch.equal(images, found.float().clamp(0, 1))
    again = sampler.sample(2, start=2, seed=9, progress=False, **options)
    assert torch.equal(again, images[2:])


@pytest.mark.parametrize("method", ["heun", "dpmpp", "ancestral"])
@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
def test_inpainting_keeps_known_pixels(plain_sampler, method, variant):
    known = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < 4
    out = plain_sampler.inpaint(
        known, mask, variant=variant, method=method, steps=4, progress=False
    )
    assert torch.equal(out[..., :4], known[..., :4])
    assert not torch.allclose(out[..., 4:], known[..., 4:], atol=0.05)


@pytest.fixture(scope="module")
def plain_sampler():
    return Sampler(tiny(), engine="eager", batch_size=2)


def test_interpolation_needs_noise(plain_sampler):
    quiet = {"steps": 4, "progress": False}
    for method, silent in (("euler", {}), ("heun", {}), ("dpmpp", {"eta": 0.0})):
        with pytest.raises(ValueError, match=f"noise of steps, and '{method}' draws none"):
            plain_sampler.interpolate(1, 3, method=method, **silent, **quiet)
    for method, noisy in (("heun", {"churn": 2.0}), ("dpmpp", {})):
        frames = plain_sampler.interpolate(1, 3, method=method, **noisy, **quiet)
        assert not torch.equal(frames[0], frames[2])


def test_the_command_line(tiny_folder, monkeypatch, capsys):
    monkeypatch.chdir(tiny_folder.parent)
    model = ncsn_fast.load(tiny_folder)
    common = ["--model", "model", "--engine", "eager", "--quiet", "--n", "2", "--out-dir"]
    words = "--method heun --steps 3 --schedule karras --rho 4 --churn 2 --s-min 0.1 --s-max 9"
    assert sample.main([*common, "a", *words.split(), "--s-noise", "1.1"]) == 0
    options = {"schedule": "karras", "rho": 4.0, "churn": 2.0, "s_min": 0.1, "s_max": 9.0}
    expected = Sampler(model, engine="eager").sample(
        2, method="heun", steps=3, s_noise=1.1, progress=False, **options
    )

    for i, image in enumerate(to_uint8(expected)[..., 0]):
        with Image.open(sample_path(tiny_folder.parent / "a", i)) as picture:
            assert np.array_equal(np.asarray(picture), image)
    assert sample.main([*common, "b", "--method", "em", "--steps", "3", "--t-end", "0.1"]) == 0
    assert sample.main([*common, "c", "--method", "dpmpp", "--eta", "0.5", "--steps", "2"]) == 0
    with pytest.raises(ValueError, match="'em' has no option schedule"):
        sample.main([*common, "d", "--method", "em", "--schedule", "karras"])


def test_every_option_has_one_row_one_type_and_a_default():
    used = {name for row in methods.METHODS.values() for name in row.parameters}
    assert used == set(methods.OPTIONS)
    for name in methods.OPTIONS:
        found = methods.methods_with(name)
        assert all(p.default is not p.empty for p in found.values()), name
        of_methods = {methods.METHODS[method].types[name] for method in found}
        assert len({t | None for t in of_methods}) == 1, name  # None leaves it to the method


def test_defaults_are_told_by_method():
    assert methods.defaults("eta") == (
        "that of the rows of a fitted table for fast; 1 for dpmpp, ancestral"
    )
    assert methods.defaults("denoise") == "True for all methods"
    assert methods.defaults("snr") == "0.16 for pc"
    assert "50 for euler; 18 for heun" in methods.default_steps()
