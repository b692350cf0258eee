"""Training of the U-Nets of score_sde and EDM: levels, weights, and a few steps of each run."""

import json
import math

import pytest
import tiny
import torch
import unets

import ncsn_fast
from ncsn_fast import ScoreModel, train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.diffusion.objectives import weighted_score_matching
from ncsn_fast.diffusion.parameterisation import DiscreteVP
from ncsn_fast.diffusion.sde import VP
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.training.configs import CONFIGS, TrainConfig
from ncsn_fast.training.objective import Objective
from ncsn_fast.training.trainer import Trainer
from ncsn_fast.training.weighting import Weighting

RUNS = {
    "cifar10-ncsnpp": "cifar10_ncsnpp_continuous",
    "cifar10-ddpmpp": "vp_cifar10_ddpmpp_continuous",
    "edm-cifar10": "edm-cifar10-32x32-uncond-vp",
}
SMALL = {
    "image_size": 8, "channels": 1, "ngf": 8, "multiples": (1, 2), "n_blocks": 1,
    "attention": (4,), "batch_size": 8, "steps": 3, "log_every": 1, "snapshot_every": 3, "grid": 1,
    "warmup": 0,
}  # fmt: skip
GRID = (torch.arange(10_000) + 0.5) / 10_000


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_published_ones(name):
    published, run = PUBLISHED_UNETS[RUNS[name]], CONFIGS[name]
    network = run.unet().to_dict()
    expected = published.network.to_dict()
    if name == "edm-cifar10":  # trained without augmentation here
        expected["augment_dim"] = 0
    assert network == expected
    found, config = run.unet_config(), published.config()
    assert (found.sigma_begin, found.sigma_end) == (config.sigma_begin, config.sigma_end)
    assert found.parameterisation.spec == config.parameterisation.spec
    assert found.n_sigmas == config.n_sigmas


def test_levels_and_weights_of_ve():
    w = Weighting(unets.config("ncsnpp"))
    sigma = w.sigma(GRID)
    assert sigma.log().mean().item() == pytest.approx(math.log(50 * 0.01) / 2, abs=1e-3)
    assert sigma[[0, -1]].tolist() == pytest.approx([0.01, 50.0], rel=1e-3)
    assert w.weight(sigma).unique().tolist() == [0.5]


def test_levels_and_weights_of_vp():
    w = Weighting(unets.config("ddpmpp"))
    sigma = w.sigma(GRID).double()
    t = 1e-5 + (1 - 1e-5) * GRID.double()
    torch.testing.assert_close(2 * sigma, VP().noise_level(t), rtol=1e-5, atol=0)
    assert w.weight(sigma.float()).unique().tolist() == [1 / 64]


def test_levels_of_discrete_chains():
    for name, levels, weight in (
        ("ddpm", DiscreteVP().sigmas / 2, 1 / 64),
        ("ncsnpp-discrete", unets.config("ncsnpp-discrete").ladder().tolist(), 0.5),
    ):
        w = Weighting(unets.config(name))
        sigma, counts = w.sigma(GRID).unique(return_counts=True)
        torch.testing.assert_close(
            sigma.double(), torch.tensor(sorted(levels), dtype=torch.float64), rtol=1e-6, atol=0
        )
        assert counts.max() - counts.min() <= 1
        assert w.weight(sigma).unique().tolist() == [weight]


def test_levels_and_weights_of_edm():
    w = Weighting(unets.config("edm-adm"))
    log = (2 * w.sigma(GRID)).double().log()
    assert (log.mean().item(), log.std().item()) == pytest.approx((-1.2, 1.2), abs=2e-3)
    assert torch.isfinite(w.sigma(torch.tensor([0.0, 1 - 2**-24]))).all()
    sigma = torch.tensor([0.1, 3.0])
    expected = [((2 * s) ** 2 + 0.25) / 0.25 for s in (0.1, 3.0)]
    assert w.weight(sigma).tolist() == pytest.approx(expected)


def test_the_loss_of_edm_by_hand():
    """lambda || D(y + n; sigma) - y ||^2 with lambda = (sigma^2 + d^2) / (sigma d)^2."""
    model = unets.model("edm-adm")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 8, 8, generator=generator)
    noise = torch.randn(4, 1, 8, 8, generator=generator)
    uniform = torch.tensor([0.02, 0.4, 0.6, 0.97])
    with torch.no_grad():
        _, losses = Objective(model, 2.0)(x, uniform, noise)
        sigma = Weighting(unets.config("edm-adm")).sigma(uniform)
        denoised = 2 * model.denoise(x + sigma.view(-1, 1, 1, 1) * noise, sigma) - 1
    sigma = 2 * sigma
    factor = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = factor * (denoised - (2 * x - 1)).square().flatten(1).sum(1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_the_weighted_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 2, 3, 4, 5, generator=generator).unbind()
    sigma, weight = torch.tensor([0.3, 7.0]), torch.tensor([0.5, 3.0])
    losses = weighted_score_matching(lambda y, s: -y / s[0], x, sigma, z, weight)
    for n in range(2):
        residual = -(x[n] + sigma[n] * z[n]) / 0.3 + z[n]
        expected = weight[n] * residual.square().sum()
        assert losses[n].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_few_steps(name, in_tmp):
    settings = {**vars(CONFIGS[name]), **SMALL, "data": "digits", "workers": 0, "n_sigmas": 8}
    config = TrainConfig(**settings)
    run, stopped = train.train(config, progress=False)
    assert stopped is None
    model = ncsn_fast.load(run)
    assert isinstance(model.config, UNetConfig)
    assert model.config == config.unet_config()
    with torch.device("meta"):
        new = ScoreModel(model.config)
    assert model.state_dict().keys() == new.state_dict().keys()
    assert len(list((run / "samples").glob("*.png"))) == 1
    moved = Trainer(config, config.unet_config(), torch.device("cpu")).model.state_dict()
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, moved[k])]
    fixed = ("all_modules.0.W", "resample_filter", "sigmas")
    assert {*moved} - {*changed} == {k for k in moved if k.endswith(fixed)}


@pytest.mark.parametrize("name", RUNS)
def test_a_dry_run_prints_all(name, in_tmp, capsys):
    assert train.main(["--config", name, "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = PUBLISHED_UNETS[RUNS[name]].config()
    assert found["sigma_begin"] == pytest.approx(config.sigma_begin)
    assert found["sigma_end"] == pytest.approx(config.sigma_end)
    assert found["n_sigmas"] == config.n_sigmas
    assert found["multiples"] == list(config.network.shape.widths[i] // 128 for i in range(
        len(config.network.shape.widths)))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("cifar10-ncsnpp", {"act": "elu"}, "needs act 'swish'"),
        ("cifar10-ncsnpp", {"preconditioning": "EDMPrecond"}, "must be one of ve, discrete_ve"),
        ("edm-cifar10", {"preconditioning": "vp"}, "must be one of VPPrecond"),
        ("edm-cifar10", {"image_size": 34}, "multiple of 4"),
        ("edm-cifar10", {"dropout": 1.0}, "probabilities"),
        ("cifar10-ddpmpp", {"preconditioning": "ve"}, "must be one of discrete_ve"),
    ],
)
def test_settings_that_no_run_has(name, change, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**{**vars(CONFIGS[name]), **change})


def test_dropout_is_the_same_when_a_run_is_resumed(in_tmp):
    settings = {**vars(CONFIGS["edm-cifar10"]), **SMALL, "data": "digits", "workers": 0, "grid": 0}

    def run(name, steps, resume=False):
        more = {"name": name, "steps": steps, "dropout": 0.5, "snapshot_every": 1}
        torch.manual_seed(steps)  # processes come with any state
        train.train(TrainConfig(**{**settings, **more}), resume=resume, progress=False)
        return training_run.read_run(in_tmp / "runs" / name).contents["model"]

    whole, first = run("whole", 3), run("parts", 1)
    assert not tiny.same(first, whole)
    assert tiny.same(run("parts", 3, resume=True), whole)
