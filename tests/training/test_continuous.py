"""The continuous-time loss, and training the tutorial's U-Net with it."""

import json

import golden
import pytest
import tiny
import torch

import ncsn_fast
from ncsn_fast import Sampler, train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli import command
from ncsn_fast.data import datasets
from ncsn_fast.diffusion.objectives import continuous_score_matching, times_of
from ncsn_fast.models.architectures import VERSIONS
from ncsn_fast.models.unet import Clock
from ncsn_fast.ops import noise
from ncsn_fast.training.configs import CONFIGS, TrainConfig
from ncsn_fast.training.trainer import Trainer

SETTINGS = {
    "ngf": 4, "batch_size": 8, "n_sigmas": 6, "steps": 4, "log_every": 2, "snapshot_every": 4,
    "grid": 4, "epsilon": 2e-5,
}  # fmt: skip
CLOCKS = {name: Clock(name, v.sigma_min, v.sigma_max) for name, v in VERSIONS.items()}
IMAGES = torch.randint(
    256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def trainer(name="mnist-sde", **changes):
    row = CONFIGS[name]
    config = TrainConfig(**{**vars(row), **SETTINGS, **changes})
    found = train.resolve_ladder(config, datasets.MemoryImages(IMAGES))
    return Trainer(config, found, torch.device("cpu"))


def arguments(**changes):
    pairs = ((f"--{k.replace('_', '-')}", str(v)) for k, v in {**SETTINGS, **changes}.items())
    return ["--config", "mnist-sde", *(word for pair in pairs for word in pair)]


def test_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    t, std = torch.tensor([0.3, 0.9]), torch.tensor([0.02, 7.0])
    losses = continuous_score_matching(lambda y, t: y * t[:, None, None, None], x, t, std, z)
    for n in range(2):
        score = t[n] * (x[n] + std[n] * z[n])
        assert losses[n].item() == pytest.approx(((std[n] * score + z[n]) ** 2).sum().item())


@pytest.mark.parametrize(
    ("version", "variance", "least"),
    [("a", 0.25, 398.2585), ("a", 0.0625, 327.9643), ("b", 0.25, 152.7287), ("b", 0.0625, 74.5583)],
)
def test_least_loss_of_gaussian_data(version, variance, least):
    """The exact score's loss is D E[s^2 / (s^2 + std(t)^2)]; the zero score's is D."""
    clock, n, mean = CLOCKS[version], 20_000, 0.5
    generator = torch.Generator().manual_seed(0)
    t = clock.t_min + (1 - clock.t_min) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    std = clock.std(t)
    shape = (n, 1, 4, 4)
    x = mean + variance**0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)

    def exact(y, t):
        return -(y - mean) / (variance + clock.std(t).square())[:, None, None, None]

    losses = continuous_score_matching(exact, x, t, std, z)
    assert losses.mean().item() * 784 / 16 == pytest.approx(least, rel=0.01)
    zero = continuous_score_matching(lambda y, t: torch.zeros_like(y), x, t, std, z)
    assert zero.mean().item() == pytest.approx(16, rel=0.01)


def test_times_are_uniform():
    t = times_of(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), 0.25)
    assert t.dtype == torch.float32
    assert 0.25 <= float(t.min()) < 0.2501
    assert 0.9999 < float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.625, abs=0.003)


@pytest.mark.parametrize("name", ["mnist-sde", "mnist-sde-b"])
def test_step_is_adam_on_the_mean_loss(name):
    t, by_hand = trainer(name, lr=0.01, adam_eps=1.0), trainer(name)
    level, losses = t.train_step(IMAGES[:8])
    model, x = by_hand.model, IMAGES[:8] / 255
    t_min = {"mnist-sde": 1e-3, "mnist-sde-b": 1e-5}[name]
    places = torch.arange(8)
    times = t_min + (1 - t_min) * noise.uniform(0, places, 8, 1, (1,))[:, 0]
    z = noise.normal(0, places, 8, 0, x.shape[1:])
    std = model.clock.std(times).float()[:, None, None, None]
    expected = (model(x + std * z, times) + z).square().sum((1, 2, 3))
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(level, model.nearest_level(std.flatten()))
    expected.mean().backward()
    pairs = list(zip(t.model.named_parameters(), model.parameters(), strict=True))
    frozen = [name for (name, ours), theirs in pairs if theirs.grad is None]
    assert frozen == ["net.embed.W" if name == "mnist-sde" else "net.embed.0.W"]
    for (_, ours), theirs in pairs:
        grad = torch.zeros(()) if theirs.grad is None else theirs.grad
        step = 0.01 * grad / (grad.abs() + 1)  # Adam's first step
        torch.testing.assert_close(ours.data, theirs.data - step, rtol=1e-5, atol=3e-6)


def test_the_loss_falls():
    t = trainer(lr=2e-3, ngf=8)
    digits = datasets.digits("train", 28)[0]
    losses = [t.train_step(digits[(8 * i) % 1400 :][:8])[1].mean() for i in range(60)]
    assert torch.stack(losses[-15:]).mean() < 0.7 * torch.stack(losses[:5]).mean()


def test_autocast_keeps_the_time_in_float32():
    (_, losses), (_, exact) = (trainer(autocast=t).train_step(IMAGES[:8]) for t in ("bf16", "none"))
    assert losses.dtype == torch.float32
    assert 0 < (losses - exact).norm() / exact.norm() < 0.03


def test_a_run_from_the_command_line(in_tmp, capsys):
    assert train.main(arguments()) == 0
    assert "sample from it" in capsys.readouterr().out
    run = in_tmp / "runs" / "mnist-sde"
    model = ncsn_fast.load(run)
    assert (model.conditioning, model.image_shape) == ("time", (1, 28, 28))
    assert (model.config.sigma_min, model.config.sigma_max) == (0.01, 22.0)
    assert len(list((run / "samples").glob("*.png"))) == 1
    samples = Sampler(run, engine="eager").sample(2, method="cas", progress=False)
    assert samples.shape == (2, 1, 28, 28)


def test_resuming_gives_the_same_weights(in_tmp):
    assert train.main(arguments(name="whole", snapshot_every=2, ema=0.9)) == 0
    assert train.main(arguments(name="parts", snapshot_every=2, ema=0.9, steps=2)) == 0
    assert train.main([*arguments(name="parts", snapshot_every=2, ema=0.9), "--resume"]) == 0
    whole, parts = (training_run.read_run(in_tmp / "runs" / n).contents for n in ("whole", "parts"))
    assert tiny.same(whole["model"], parts["model"])
    assert tiny.same(whole["ema"], parts["ema"])


def test_ladder_of_a_run_starts_at_the_last_time():
    found = trainer("mnist-sde-b", sigma_begin=0.0, n_sigmas=0, epsilon=0.0).model.config
    row = CONFIGS["mnist-sde-b"]
    assert found.sigma_begin == pytest.approx(row.sigma_begin, rel=1e-6)
    assert (found.n_sigmas, found.epsilon) == (row.n_sigmas, pytest.approx(row.epsilon, rel=0.02))
    with pytest.raises(ValueError, match=r"sigma_begin must be at most 9.99999, .* got 22"):
        trainer(sigma_max=10.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "unet_a"], "28, 36, 44"),
        (["--arch", "unet_a", "--image-size", "28"], "start from --config mnist-sde"),
        (["--config", "mnist-sde", "--act", "elu"], "needs act 'swish'"),
        (["--config", "mnist-sde", "--sigma-max", "0"], "sigma_min < sigma_max"),
    ],
)
def test_settings_that_do_not_fit(options, words, capsys):
    assert command.run(lambda: train.main([*options, "--dry-run"])) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_dry_run_prints_the_settings(capsys):
    assert train.main(["--config", "mnist-sde", "--dry-run"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["lr"], settings["batch_size"], settings["ema"]) == (1e-4, 32, 0.0)
    assert golden.read("tutorial_a_28")[0]["sigma_max"] == settings["sigma_max"]
