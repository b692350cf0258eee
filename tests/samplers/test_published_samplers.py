"""Published samplers: tables beside the papers' numbers, and VP chains beside DDPM's."""

import math

import exact
import numpy as np
import pytest
import torch
import unets

from ncsn_fast import Sampler, ScoreModel
from ncsn_fast.cli.sample_options import SampleOptions
from ncsn_fast.diffusion.sde import VP, SubVP
from ncsn_fast.inference.sampling_params import SamplingCall
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.few_step import Churn, heun
from ncsn_fast.samplers.program import Chains, run
from ncsn_fast.samplers.published_samplers import PUBLISHED_SAMPLERS
from ncsn_fast.samplers.reverse_sde import euler_maruyama

UNITS = 2.0  # EDM's images are in [-1, 1]


@pytest.fixture(scope="module")
def models():
    names = ("edm-ddpmpp", "edm-ddpmpp-vp", "edm-ncsnpp", "edm-iddpm", "ncsnpp", "ddpmpp", "ddpm")
    return {name: ScoreModel(unets.config(name)) for name in (*names, "ncsnpp-vp")}


def table(model, name, **options):
    return SamplingCall.from_keywords({"published": name, **options}).build(model)


@pytest.mark.parametrize(
    ("name", "nfe"),
    [("edm-cifar10", 35), ("edm-ffhq", 79), ("edm-afhqv2", 79), ("edm-imagenet64", 511)],
)
def test_edm_takes_the_evaluations_of_the_paper(models, name, nfe):
    assert table(models["edm-ddpmpp"], name).nfe == nfe
    assert PUBLISHED_SAMPLERS[name].source.endswith(f"{nfe} evaluations")


def test_edm_has_the_levels_of_the_paper(models):
    """t_i of Karras et al. 2022, equation 5, with N = 18: 80, 57.58598, .., 0.00752802, 0.002."""
    program = table(models["edm-ddpmpp"], "edm-cifar10")
    t = UNITS * program.sigma[[0, 1, -3, -1]]
    assert t == pytest.approx([80, 57.58598, 0.00752802, 0.002], rel=1e-6)
    assert not program.draws_noise


def test_edm_churns_as_for_imagenet(models):
    """gamma = 40 / 256 for t in [0.05, 50], and noise of 1.003 sqrt(t_hat^2 - t^2)."""
    program = table(models["edm-ddpmpp"], "edm-imagenet64")
    i = np.arange(256)
    t = (80 ** (1 / 7) + i / 255 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    raised = np.where((t >= 0.05) & (t <= 50), t * (1 + 40 / 256), t)
    assert UNITS * program.sigma[::2] == pytest.approx(raised, rel=1e-6)
    noise = 1.003 * np.sqrt(raised**2 - t**2)
    assert UNITS * program.c[1::2] == pytest.approx(noise[1:], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        ("edm-ddpmpp-vp", (80, 0.002)),
        ("edm-ncsnpp", (80, 0.02)),
        ("ncsnpp", (80, 0.02)),
        ("edm-iddpm", (80.2036972, 0.00642234)),
    ],
)
def test_edm_stays_within_the_levels_of_a_network(models, model, ends):
    """sigma_max = min(80, net.sigma_max) and sigma_min = max(0.002, net.sigma_min), rounded."""
    sigma = UNITS * table(models[model], "edm-cifar10").sigma
    assert (sigma[0], sigma[-1]) == pytest.approx(ends, rel=1e-6)


def test_churned_levels_are_rounded_to_those_of_a_chain(models):
    known = models["edm-iddpm"].parameterisation
    program = table(models["edm-iddpm"], "edm-imagenet64")
    assert known.nearest_levels(program.sigma) == pytest.approx(program.sigma, rel=1e-12)
    assert (program.c >= 0).all()
    # A level of the caller's is never lowered.
    assert Churn(1.0, known=lambda s: 0.5 * s).raised(np.array([2.0, 1.0])).tolist() == [2.0, 1.0]


def test_limits_of_levels(models):
    model = models["ncsnpp"]
    program = methods.build("dpmpp", model, 5, {"sigma_max": 10.0, "sigma_min": 0.1})
    assert program.sigma == pytest.approx(np.geomspace(10, 0.1, 5), rel=1e-6)
    wider = methods.build("dpmpp", model, 5, {"sigma_max": 1e3, "sigma_min": 1e-9})
    assert wider.sigma == pytest.approx(np.geomspace(50, 0.01, 5), rel=1e-6)
    ladder = methods.build("reverse", model, None, {"sigma_max": 1.0}).sigma
    assert ladder[0] == pytest.approx(1.0)
    assert ladder[1:] == pytest.approx(model.sigmas[model.sigmas < 1].numpy(), rel=1e-6)
    for low, high in (
        (2.0, 1.0),
        (math.nan, 1.0),
        (60.0, None),
        (None, 1e-3),
        (None, -1.0),
        (1.0, math.nan),
    ):
        with pytest.raises(ValueError, match="expected sigma_min <= sigma_max in a range"):
            methods.build("dpmpp", model, 5, {"sigma_min": low, "sigma_max": high})


@pytest.mark.parametrize(
    ("name", "model", "nfe"),
    [
        ("ve-pc", "ncsnpp", 24),
        ("ve-pc-256", "ncsnpp", 24),
        ("reverse-diffusion", "ncsnpp", 12),
        ("ancestral", "ncsnpp", 12),
        ("vp-pc", "ddpmpp", 1000),
        ("vp-pc", "ncsnpp-vp", 1000),
        ("vp-ancestral", "ddpm", 1000),
        ("probability-flow", "ddpmpp", None),
    ],
)
def test_score_sde_takes_the_networks_own_steps(models, name, model, nfe):
    assert table(models[model], name).nfe == nfe


def test_predictor_corrector_is_that_of_the_configuration():
    """snr by image size, norms of the batch, one Langevin step before the predictor."""
    snr = {"ve-pc": 0.16, "ve-pc-celeba": 0.17, "ve-pc-256": 0.075, "ve-pc-1024": 0.15}
    for name, value in snr.items():
        options = PUBLISHED_SAMPLERS[name].options
        assert (options["snr"], options["norm"], options["order"]) == (
            value, "batch", "corrector_first"
        )  # fmt: skip
    flow = PUBLISHED_SAMPLERS["probability-flow"].options
    assert flow == {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("name", "sde"), [("ddpmpp", VP()), ("ncsnpp-vp", SubVP())])
def test_vp_euler_maruyama_is_the_published_one(models, name, sde):
    """The states x_t of the SDE, and those of our program, from the same noise."""
    n, samples, mean, spread = 60, torch.arange(4), 0.3, 0.2
    theirs = euler_maruyama(sde, n, t_end=1e-3)
    ours = methods.build("em", models[name], n, {})
    times = np.linspace(1.0, 1e-3, n)
    m = sde.mean_scale(times)
    z = exact.normals(4, 1, 8, 8)
    x0 = exact.Gaussian(mean, spread)

    def network(u, k):  # of x_t for data 2 x - 1
        variance = (UNITS * m[k] * spread) ** 2 + theirs.sigma[k] ** 2
        return -theirs.sigma[k] * (u - m[k] * (UNITS * mean - 1)) / variance

    run(theirs, network, chain := Chains(z.clone(), 3, samples))
    start = (z / m[0] + 1) / UNITS
    run(
        ours,
        lambda x, k: float(ours.sigma[k]) * x0.score(x, torch.full((4,), ours.sigma[k])),
        own := Chains(start.contiguous(), 3, samples),
    )
    torch.testing.assert_close(UNITS * own.x - 1, chain.x, rtol=0, atol=3e-4)
    assert ours.mean == pytest.approx(np.full((1, 8, 8), 0.5))
    assert UNITS * ours.sigma == pytest.approx(sde.noise_level(times))


def test_vp_ancestral_is_ddpms(models):
    """x' = (x - beta eps / sqrt(1 - abar)) / sqrt(1 - beta) + sqrt(beta) z, for y = x / m."""
    program = table(models["ddpm"], "vp-ancestral")
    beta = np.linspace(1e-4, 0.02, 1000)[::-1]
    m = np.sqrt(np.cumprod(1 - beta[::-1]))[::-1]
    after = np.append(m[1:], 1.0)
    assert program.a == pytest.approx(m / (np.sqrt(1 - beta) * after), rel=1e-9)
    b = beta / np.sqrt((1 - m**2) * (1 - beta)) / after
    assert UNITS * program.b == pytest.approx(b, rel=1e-5)  # the ladder is float32
    c = np.append((np.sqrt(beta) / after)[:-1], 0.0)
    assert UNITS * program.c == pytest.approx(c, rel=1e-3)
    noisy = table(models["ddpm"], "vp-ancestral", denoise=False)
    assert UNITS * noisy.c[-1] == pytest.approx(math.sqrt(beta[-1]), rel=1e-3)


def test_forward_variance_of_ve_is_that_of_reverse_diffusion(models):
    forward = methods.build("ancestral", models["ncsnpp"], None, {"variance": "forward"})
    reverse = methods.build("reverse", models["ncsnpp"], None, {})
    assert forward.c == pytest.approx(reverse.c)
    assert forward.b == pytest.approx(reverse.b)


def test_options_beside_the_name_win(models):
    model = models["edm-ddpmpp"]
    assert table(model, "edm-cifar10", steps=5).nfe == 9
    assert table(model, "edm-cifar10", method="heun", churn=3.0).draws_noise
    assert table(model, "edm-cifar10", sigma_max=10.0).sigma[0] == pytest.approx(10)
    given = table(model, "edm-imagenet64", sigmas=[20.0, 1.0])
    churn = Churn(40.0, 0.025, 25.0, 1.003)
    assert given.c == pytest.approx(heun([20.0, 1.0], churn=churn).c)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"published": "edm"}, "published must be one of edm-cifar10, .*; got 'edm'"),
        ({"published": "edm-ffhq", "method": "pc"}, "is of method 'heun'; got method 'pc'"),
        ({"published": "edm-ffhq", "snr": 0.1}, "method 'heun' has no option snr"),
        (
            {"published": "ve-pc"},
            "of VE networks, and this model's is VP; take one of edm",
        ),
        ({"published": "vp-ancestral"}, "is of discrete VP networks, and this model's is VP"),
    ],
)
def test_refuses(models, options, words):
    sampler = Sampler(models["ddpmpp"], engine="eager", device="cpu")
    with pytest.raises(ValueError, match=words):
        sampler.sample(1, **options)
    with pytest.raises(ValueError, match=words):
        sampler.plan(1, **options)
    with pytest.raises(ValueError, match=words):
        sampler.inpaint(torch.zeros(1, 1, 8, 8), torch.ones(1), **options)


def test_vp_chains_start_at_time_one(models):
    with pytest.raises(ValueError, match="'em' starts at time 1 of a VP-SDE; take method reverse"):
        methods.build("em", models["ddpmpp"], 5, {"sigma_start": 1.0})


def test_the_command_line_resolves_names(models):
    options = SampleOptions(published="edm-imagenet64", steps=4, churn=1.0)
    assert options.method_options() == {
        "method": "heun", "steps": 4, "schedule": "karras", "sigma_max": 40.0, "sigma_min": 0.001,
        "churn": 1.0, "s_min": 0.025, "s_max": 25.0, "s_noise": 1.003, "denoise": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="is of method 'heun'; got method 'cas'"):
        SampleOptions(published="edm-ffhq", method="cas")
    with pytest.raises(ValueError, match="'pc' has no option churn"):
        SampleOptions(published="ve-pc", churn=1.0)
    SampleOptions(published="vp-pc").check_model(models["ddpmpp"])
    with pytest.raises(ValueError, match="vp-pc is of VP networks, and this model's is VE"):
        SampleOptions(published="vp-pc").check_model(models["ncsnpp"])


def test_samples_of_a_name_are_those_of_its_options(models):
    sampler = Sampler(models["ddpmpp"], engine="eager", device="cpu")
    named = sampler.sample(2, published="vp-pc", steps=3, progress=False)
    assert torch.equal(named, sampler.sample(2, method="em", steps=3, progress=False))
    assert sampler.report.nfe == 3


@pytest.mark.parametrize(
    ("name", "model"), [("vp-pc", "ddpmpp"), ("edm-imagenet64", "edm-ddpmpp-vp")]
)
def test_engines_agree(models, name, model):
    """The constant of a VP chain's rows reaches the engine's own loop."""
    options = {"published": name, "steps": 3, "progress": False}
    eager = Sampler(models[model], engine="eager", device="cpu").sample(2, **options)
    own = Sampler(models[model], engine="cpu", dtype="fp32").sample(2, **options)
    torch.testing.assert_close(own, eager, rtol=0, atol=1e-4)
