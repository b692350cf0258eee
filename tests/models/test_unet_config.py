"""Models of the U-Nets: what they see and give at a noise level, files, and every method."""

import json
import math

import numpy as np
import pytest
import torch
import unets

import ncsn_fast
from ncsn_fast import CheckpointError, Sampler, ScoreModel
from ncsn_fast.diffusion.parameterisation import IDDPM, DiscreteVP, standard
from ncsn_fast.diffusion.sde import VP, SubVP
from ncsn_fast.models.adapter import ParameterisedConfig
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.unet_config import UNetConfig, edm_config, preconditioned
from ncsn_fast.samplers.methods import METHODS

ADAPTIVE = ("ode", "adaptive")


@pytest.fixture(scope="module")
def models():
    """One tiny model of each kind."""
    return {name: unets.model(name) for name in unets.TINY}


def column(values):
    return values.float().view(-1, 1, 1, 1)


def published_score(name, model, x, sigma):
    """Score of data in [0, 1], written out as each code base does, for x_0 + sigma z.

    A VP network sees x_t = m u, where u is 2x - 1; d log p / dx is twice that of u, and the score
    of u is m times that of x_t.
    """
    net, u, s = model.net, 2 * x - 1, 2 * sigma
    if name in ("ncsnpp", "ncsnpp-skip"):
        return net(x, sigma.float()) / column(sigma)
    if name == "ncsnpp-discrete":
        ladder = np.geomspace(50, 0.01, 12)
        level = torch.tensor([np.abs(np.log(ladder / n)).argmin() for n in sigma.tolist()])
        return net(x, level) / column(sigma)
    if name in ("ncsnpp-vp", "ddpmpp"):
        sde = SubVP() if name == "ncsnpp-vp" else VP()
        t = sde.time(s)
        m, std = sde.mean_scale(t), sde.std(t)
        return -2 * column(m / std) * net(column(m) * u, (999 * t).float())
    m = 1 / (1 + s.square()).sqrt()
    if name in ("ddpm", "edm-iddpm"):
        chain = DiscreteVP() if name == "ddpm" else IDDPM()
        found = np.abs(np.log(chain.sigmas)[None] - np.log(s.numpy())[:, None]).argmin(axis=1)
        return -2 / column(s) * net(column(m) * u, torch.from_numpy(found).float())
    if name == "edm-ddpmpp-vp":
        t = ((0.01 + 2 * 19.9 * torch.log1p(s.square())).sqrt() - 0.1) / 19.9
        return -2 / column(s) * net(column(m) * u, (999 * t).float())
    if name == "edm-ncsnpp":
        return 2 / column(s) * net(u, (s / 2).log().float())
    inner = 1 / (s.square() + 0.25).sqrt()
    f = net(column(inner) * u, (s.log() / 4).float()).double()
    inner, s = (c.view(-1, 1, 1, 1) for c in (inner, s))
    denoised = 0.25 * inner.square() * u + s * 0.5 * inner * f
    return 2 * (denoised - u) / s.square()


@pytest.mark.parametrize("name", unets.TINY)
@torch.no_grad()
def test_scores_are_the_published_ones(models, name):
    model = models[name]
    sigma = model.sigmas[[0, len(model.sigmas) // 2, -2]].double()
    x = torch.rand(3, 1, 8, 8) + column(sigma) * torch.randn(3, 1, 8, 8)
    expected = published_score(name, model, x, sigma)
    scale = expected.flatten(1).abs().amax(dim=1)
    error = (model.score(x, sigma) - expected).flatten(1).abs().amax(dim=1) / scale
    assert error.max() < 2e-5


def test_levels_of_discrete_chains_are_those_of_the_model(models):
    for name, chain in (("ddpm", DiscreteVP()), ("edm-iddpm", IDDPM())):
        model = models[name]
        np.testing.assert_allclose(model.sigmas, chain.sigmas[::-1] / 2, rtol=1e-6)
        indices = model.condition(model.sigmas)
        np.testing.assert_array_equal(indices, np.arange(1000)[::-1])
    assert models["ncsnpp-discrete"].conditional
    levels = models["ncsnpp-discrete"].condition(models["ncsnpp-discrete"].sigmas)
    assert levels.tolist() == list(range(12))


def test_the_chain_of_iddpm():
    """Numbers of EDM's buffer u, whose float32 recursion is off by up to 5e-4."""
    chain = IDDPM()
    u = chain.sigmas[::-1]
    assert u[0] == np.float32(20291.169921875)
    assert u[999] == np.float32(0.006422337144613266)
    assert u[500] == pytest.approx(1.01238894, rel=1e-7)
    exact = DiscreteVP(betas="cosine").sigmas[::-1]
    assert 1e-5 < np.abs(u / exact - 1).max() < 5e-4
    between = (u[499] + u[500]) / 2
    assert chain.time(np.array([between * 1.0001, between * 0.9999])).tolist() == [500, 499]
    with pytest.raises(ValueError, match="cosine"):
        IDDPM(betas="linear")


def test_samplers_take_levels_that_a_rounded_chain_knows(models):
    """EDM's round_sigma: the nearest u of each level, and of two equal ones only one."""
    from ncsn_fast.samplers.level_selection import Levels

    u = IDDPM().sigmas
    levels = Levels(steps=18, schedule="karras").between_the_ends(models["edm-iddpm"])
    ends = u[-1] ** (1 / 7), u[0] ** (1 / 7)
    wanted = (ends[0] + np.arange(18) / 17 * (ends[1] - ends[0])) ** 7
    expected = u[np.abs(wanted[:, None] - u[None]).argmin(axis=1)]
    np.testing.assert_allclose(2 * levels, np.unique(expected)[::-1], rtol=1e-6)
    many = Levels(steps=900).between_the_ends(models["ddpm"])
    assert 500 < len(many) < 900
    assert (np.diff(many) < 0).all()
    assert np.isin(many, DiscreteVP().sigmas / 2).all()
    free = Levels(steps=5).between_the_ends(models["ddpmpp"])
    np.testing.assert_allclose(free, np.geomspace(*models["ddpmpp"].sigmas[[0, -1]], 5), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["ncsnpp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddpm", "edm-adm"))]
)
def test_every_method_runs(models, name, method):
    options = {"rtol": 1.0, "atol": 1.0} if method in ADAPTIVE else {"steps": 2}
    if method == "ald":
        options = {"steps": 2, "n_steps_each": 1}
    images = Sampler(models[name], engine="eager").sample(2, method=method, **options)
    assert images.shape == (2, 1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("name", ["edm-ddpmpp", "edm-adm"])
def test_labels_and_guidance(models, name):
    sampler = Sampler(models[name], engine="eager")
    x, sigma = torch.rand(1, 1, 8, 8), 0.5
    model = models[name]
    with torch.no_grad():
        free, one = model.score(x, sigma), model.score(x, sigma, torch.tensor([1]))
        torch.testing.assert_close(model.score(x, sigma, torch.tensor([3])), free)
    assert (one - free).abs().max() > 1e-3 * free.abs().max()
    options = {"method": "heun", "steps": 3, "progress": False}
    plain, labelled, guided = (
        sampler.sample(1, **options, **more)
        for more in ({}, {"labels": 1}, {"labels": 1, "guidance": 3.0})
    )
    assert not torch.equal(plain, labelled)
    assert not torch.equal(labelled, guided)
    with pytest.raises(ValueError, match="label"):
        sampler.sample(1, **options, labels=3)


def test_a_likelihood_needs_a_score_between_the_levels(models):
    with pytest.raises(ValueError, match="nowhere between them"):
        Sampler(models["ncsnpp-discrete"], engine="eager").log_likelihood(torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("name", unets.TINY)
def test_models_are_written_and_read_back(models, name, tmp_path):
    model = models[name]
    model.save_pretrained(tmp_path)
    back = ncsn_fast.load(tmp_path)
    assert isinstance(back.config, UNetConfig)
    assert back.config == model.config
    assert hash(back.config) == hash(model.config)
    assert back.digest() == model.digest()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        sigma = float(model.sigmas[3])
        torch.testing.assert_close(back.score(x, sigma), model.score(x, sigma), rtol=0, atol=0)


def test_frequencies_stay_exact_in_half_precision(models, tmp_path):
    from ncsn_fast.checkpoints.model_folder import save_model

    save_model(models["ncsnpp"], tmp_path, dtype=torch.bfloat16)
    back = ncsn_fast.load(tmp_path).net.state_dict()
    state = models["ncsnpp"].net.state_dict()
    assert torch.equal(back["all_modules.0.W"], state["all_modules.0.W"])
    matrix = next(key for key in state if key.endswith("NIN_0.W"))
    assert torch.equal(back[matrix], state[matrix].bfloat16().float())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"network": {"arch": "resnet"}}, "arch must be one of ncsnpp"),
        ({"network": {"arch": "ncsnpp", "nf": "8"}}, "nf of ncsnpp must be an integer"),
        ({"network": 3}, "not iterable"),
        ({"network": {"arch": "ncsnpp"}}, "do not fit network 'ncsnpp'"),
        ({"parameterisation": {"predicts": "all"}}, "predicts must be one of"),
        (
            {
                "parameterisation": {
                    "predicts": "scaled_score",
                    "sees": "nothing",
                    "data_range": [0, 1],
                }
            },
            "sees the noise",
        ),
        ({"parameterisation": None}, "not iterable"),
        ({"colour": 1}, "unknown model config fields: colour"),
        ({"epsilon": -1.0}, "epsilon must be a positive number"),
        ({"n_steps_each": 10**6}, "NCSN_FAST_MAX_STEPS"),
        ({"sigma_begin": 49.0}, "says 49 to 0.01"),
        ({"sigma_begin": 0.001}, "sigma_end <= sigma_begin"),
        ({"n_sigmas": 13}, "n_sigmas is 13"),
    ],
)
def test_configs_that_are_not_of_a_model(models, change, text, tmp_path):
    models["ncsnpp"].save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=text):
        ncsn_fast.load(tmp_path)


@pytest.mark.parametrize(
    ("wrapper", "change", "text"),
    [
        ("Precond", {}, "VPPrecond, VEPrecond, iDDPMPrecond, EDMPrecond"),
        ("EDMPrecond", {"model_type": "UNet"}, "SongUNet, DhariwalUNet"),
        ("EDMPrecond", {"img_channels": "3"}, "img_channels must be an integer"),
        ("EDMPrecond", {"sigma_data": "1"}, "sigma_data of EDMPrecond must be numbers"),
        ("EDMPrecond", {"colour": 1}, "unknown settings of dhariwal: colour"),
        ("iDDPMPrecond", {"C_1": 0.1}, "C_1 0.001"),
    ],
)
def test_arguments_that_no_network_of_edm_has(wrapper, change, text):
    with pytest.raises(ValueError, match=text):
        edm_config(wrapper, {"img_resolution": 16, "img_channels": 3, **change})


def test_arguments_of_edms_wrappers():
    config = edm_config(
        "VEPrecond",
        {"img_resolution": 16, "img_channels": 1, "label_dim": 4, "use_fp16": True,
         "sigma_min": 0.1, "sigma_max": 10, "model_channels": 16, "channel_mult": [1, 2]},
    )  # fmt: skip
    assert (config.arch, config.n_classes, config.image_size) == ("songunet", 4, (16, 16))
    assert (config.sigma_begin, config.sigma_end) == (5.0, 0.05)
    usual = edm_config("VPPrecond", {"img_resolution": 16, "img_channels": 3, "beta_d": 9.9})
    assert usual.parameterisation.spec["process"] == {
        "kind": "vp", "beta_min": 0.1, "beta_max": 10.0
    }  # fmt: skip
    scaled = edm_config("EDMPrecond", {"img_resolution": 16, "img_channels": 3, "sigma_data": 1})
    assert scaled.parameterisation.spec["sigma_data"] == 1.0


def test_a_preconditioning_of_no_code_base():
    with pytest.raises(ValueError, match="ve, discrete_ve, vp"):
        preconditioned(unets.TINY["ncsnpp"][0], "dsm")


def test_a_config_needs_a_network_of_a_table():
    known = standard("scaled_score", sees="sigma")
    settings = {"n_sigmas": 2, "sigma_begin": 1.0, "sigma_end": 0.1, "epsilon": 1e-3}
    with pytest.raises(ValueError, match="network must be one of ncsnpp"):
        UNetConfig(network="ncsnpp", parameterisation=known, **settings)
    assert issubclass(UNetConfig, ParameterisedConfig)


def test_published_noise_levels():
    """Of the published samplers, in [0, 1]: those of centred networks are halved."""
    ends = {
        name: (row.config().sigma_begin, row.config().sigma_end, row.config().n_sigmas)
        for name, row in PUBLISHED_UNETS.items()
    }
    assert ends["cifar10_ncsnpp"] == (50.0, 0.01, 1000)
    assert ends["celeba_ncsnpp"] == (90.0, 0.01, 1000)
    assert ends["church_ncsnpp_continuous"] == (380.0, 0.01, 2000)
    assert ends["bedroom_ncsnpp_continuous"] == (378.0, 0.01, 2000)
    assert ends["ffhq_256_ncsnpp_continuous"] == (348.0, 0.01, 2000)
    assert ends["ffhq_ncsnpp_continuous"] == (1348.0, 0.01, 2000)
    last = math.sqrt(math.expm1(10.05)) / 2
    assert ends["vp_cifar10_ddpmpp_continuous"][0] == pytest.approx(last)
    assert ends["edm-cifar10-32x32-cond-vp"][:2] == (40.0, 0.001)
    assert ends["baseline-cifar10-32x32-uncond-ve"][:2] == (50.0, 0.01)
    assert ends["baseline-imagenet-64x64-cond-adm"][2] == 1000
    assert PUBLISHED_UNETS["edm-cifar10-32x32-cond-ve"].config().n_classes == 10
    whole = ScoreModel(preconditioned(unets.TINY["edm-adm"][0], "EDMPrecond"))
    assert (whole.image_shape, whole.sample_shape, whole.bounded) == ((1, 8, 8), (1, 8, 8), True)
