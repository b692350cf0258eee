"""Training: its arithmetic, and what a run writes."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ncsn_fast
from ncsn_fast import train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli import command
from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import MemoryImages
from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.objectives import denoising_score_matching
from ncsn_fast.ops import noise
from ncsn_fast.training.journal import LevelLosses
from ncsn_fast.training.trainer import Trainer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("warmup", "decays"), [(False, [0.9] * 4), (True, [2 / 11, 3 / 12, 4 / 13, 5 / 14])]
)
def test_average_follows_its_recursion(warmup, decays):
    t = tiny.trainer(ema=0.9, ema_warmup=warmup)
    average = weights(t.model)
    for m in decays:
        assert t.averages.decays["ema"].at(t.step, 8) == pytest.approx(m)
        t.train_step(tiny.IMAGES[:8])
        average = {k: m * average[k] + (1 - m) * v for k, v in weights(t.model).items()}
    for name, weight in weights(t.averaged()).items():
        torch.testing.assert_close(weight, average[name], rtol=1e-5, atol=1e-7)
    assert not tiny.same(weights(t.averaged()), weights(t.model))
    assert tiny.trainer(ema=0.0).averaged().training  # no average: the model itself


def test_step_is_adam_on_the_mean_loss():
    t, by_hand = tiny.trainer(adam_eps=1e-3, warmup=0, lr=0.01, ema=0), tiny.trainer(ema=0)
    level, losses = t.train_step(tiny.IMAGES[:8])
    places = torch.arange(8)
    uniform = noise.uniform(0, places, 8, 1, (1,))[:, 0]
    assert torch.equal(level, (4 * uniform).long())
    model, x = by_hand.model, tiny.IMAGES[:8] / 255
    z = noise.normal(0, places, 8, 0, x.shape[1:])
    expected = denoising_score_matching(model.score_at, x, model.sigmas, level, z)
    torch.testing.assert_close(losses, expected.detach())
    expected.mean().backward()
    for ours, theirs in zip(t.model.parameters(), model.parameters(), strict=True):
        step = 0.01 * theirs.grad / (theirs.grad.abs() + 1e-3)  # Adam's first step
        torch.testing.assert_close(ours.data, theirs.data - step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [False, True])
def test_learning_rate(decay):
    t = tiny.trainer(lr=0.5, warmup=4, steps=20, decay=decay)
    rates = []
    for t.step in (0, 1, 3, 4, 10, 20):
        rates.append(t.learning_rate())
    cosine = [0.5 * (1 + math.cos(math.pi * s / 20)) if decay else 1 for s in (0, 1, 3, 4, 10, 20)]
    warm = [0.25, 0.5, 1, 1, 1, 1]
    assert rates == pytest.approx([0.5 * w * c for w, c in zip(warm, cosine, strict=True)])
    t.step = 1
    t.train_step(tiny.IMAGES[:8])
    assert t.optimizer.param_groups[0]["lr"] == pytest.approx(rates[1])


def test_gradient_clipping():
    def norm(t: Trainer) -> float:
        t.train_step(tiny.IMAGES[:8])
        grads = [p.grad for p in t.model.parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in grads]).norm())

    free = norm(tiny.trainer())
    assert norm(tiny.trainer(grad_clip=free / 3)) == pytest.approx(free / 3, rel=1e-4)
    assert norm(tiny.trainer(grad_clip=free * 3)) == pytest.approx(free, rel=1e-6)


def test_autocast_keeps_weights_and_loss_in_float32():
    t, full = tiny.trainer(autocast="bf16"), tiny.trainer()
    _, losses = t.train_step(tiny.IMAGES[:8])
    _, exact = full.train_step(tiny.IMAGES[:8])
    assert losses.dtype == torch.float32
    assert {w.dtype for w in t.model.parameters()} == {torch.float32}
    assert 0 < ((losses - exact).norm() / exact.norm()) < 0.03


def test_flips_and_dequantisation():
    ramp = torch.arange(0, 240, 30, dtype=torch.uint8).expand(2000, 1, 8, 8)

    def prepare(**changes):
        t = tiny.trainer(**changes)
        return t.prepare(ramp, t.draws(slice(0, 2000)))

    assert torch.equal(prepare(), ramp / 255)
    flipped = prepare(flip=True)
    is_flipped = flipped[:, 0, 0, 0] > 0.5
    assert torch.equal(flipped[~is_flipped], (ramp / 255)[~is_flipped])
    assert torch.equal(flipped[is_flipped], (ramp / 255).flip(3)[is_flipped])
    assert abs(float(is_flipped.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(2000)
    u = prepare(dequantise=True) * 256 - ramp
    assert -1e-4 < float(u.min()) < 0.01
    assert 0.99 < float(u.max()) < 1 + 1e-4
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())


def test_losses_by_level():
    losses = LevelLosses(20)  # eight bands of 2 or 3 levels
    losses.add(torch.tensor([0, 1, 2, 19]), torch.tensor([1.0, 3.0, 5.0, 8.0]))
    losses.add(torch.tensor([3]), torch.tensor([7.0]))
    assert losses.mean() == pytest.approx(24 / 5)
    assert losses.scalars() == pytest.approx(
        {"loss": 4.8, "loss_by_level/band_0": 3.0, "loss_by_level/band_1": 7.0,
         "loss_by_level/band_7": 8.0}
    )  # fmt: skip
    losses.reset()
    losses.add(torch.tensor([19]), torch.tensor([2.0]))
    assert losses.scalars() == {"loss": 2.0, "loss_by_level/band_7": 2.0}
    assert LevelLosses(3).bands.tolist() == [0, 1, 2]
    assert LevelLosses(1).bands.tolist() == [0]


def test_the_loss_falls():
    t = tiny.trainer(lr=5e-3)
    digits = datasets.digits("train", 8)[0]
    losses = [t.train_step(digits[(8 * i) % 1400 :][:8])[1].mean() for i in range(80)]
    assert torch.stack(losses[-20:]).mean() < 0.75 * torch.stack(losses[:10]).mean()


def test_a_ladder_is_derived_from_the_data(caplog):
    images = MemoryImages(tiny.IMAGES)
    config = tiny.train_config(sigma_begin=0.0, n_sigmas=0, epsilon=0.0)
    with caplog.at_level(logging.INFO):
        found = train.resolve_ladder(config, images)
    expected = schedule.derive(tiny.IMAGES, n_steps_each=5)
    assert (found.sigma_begin, found.n_sigmas) == (expected.sigma_begin, expected.n_sigmas)
    assert found.epsilon == pytest.approx(expected.epsilon)
    assert found.sigma_begin == pytest.approx(
        float(torch.cdist(*[tiny.IMAGES.flatten(1).double() / 255] * 2).max())
    )
    assert f"in {expected.n_sigmas} levels" in caplog.text
    paper = dataclasses.replace(config, langevin_form="paper")  # halves alpha, so epsilon doubles
    assert train.resolve_ladder(paper, images).epsilon == pytest.approx(2 * expected.epsilon)
    given = tiny.train_config(sigma_begin=3.0, n_sigmas=7, epsilon=1e-5)
    kept = train.resolve_ladder(given, images)
    assert (kept.sigma_begin, kept.n_sigmas, kept.epsilon) == (3.0, 7, 1e-5)


def test_equal_images_are_refused_with_a_remedy(in_tmp, capsys):
    Path("photos").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 77).save(f"photos/{i}.png")
    arguments = tiny.arguments(data="photos", sigma_begin=0, n_sigmas=0)
    assert command.run(lambda: train.main(arguments)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the images are all (nearly) equal: largest distance 0 <= ")
    assert "give sigma_begin and n_sigmas yourself" in said
    assert not Path("runs").exists()


def test_dry_run_resolves_what_the_run_would_derive(in_tmp, capsys, caplog):
    options = [*tiny.arguments(sigma_begin=0, n_sigmas=0, steps=90), "--dry-run"]
    with caplog.at_level(logging.INFO):
        assert train.main(options) == 0
    assert not list(in_tmp.iterdir())
    found = json.loads(capsys.readouterr().out)
    expected = schedule.derive(datasets.digits("train", 8)[0])
    assert found["sigma_begin"] == pytest.approx(expected.sigma_begin)
    assert found["n_sigmas"] == expected.n_sigmas
    assert found["epsilon"] == pytest.approx(expected.epsilon)
    assert "1437 images, 179 steps an epoch: 0.501 epochs" in caplog.text
    assert "the run starts runs/digits, and saves every 4 steps" in caplog.text
    size = sum(p.numel() for p in tiny.trainer().model.parameters())
    assert f"network ncsnv2: {size / 1e6:.2f} M parameters" in caplog.text
    assert "90 steps of 8 images: about " in caplog.text


def test_dry_run_of_a_run_to_resume(in_tmp, caplog):
    assert train.main(tiny.arguments()) == 0
    with caplog.at_level(logging.INFO):
        assert train.main([*tiny.arguments(steps=6), "--resume", "--dry-run"]) == 0
    assert "the run resumes runs/digits at step 4" in caplog.text
    refused = [*tiny.arguments(steps=6, batch_size=4), "--resume", "--dry-run"]
    assert command.run(lambda: train.main(refused)) == 1


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--data", "nowhere"], 1, "nowhere does not exist"),
        (["--data", "photos"], 1, "broken.png"),
        (["--data", ""], 2, "--config digits needs images"),
        (["--device", "cuda:99"], 1, "cuda:99"),
    ],
)
def test_dry_run_refuses_what_the_run_would(in_tmp, capsys, options, code, said):
    Path("photos").mkdir()
    Path("photos/broken.png").write_text("no picture")
    sigmas = ["--sigma-begin", "5"] if "photos" in options else []
    assert command.run(lambda: train.main([*options, *sigmas, "--dry-run"])) == code
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_damaged_images_stop_a_run_before_it_starts_or_are_left_out(in_tmp, capsys, caplog):
    Path("photos").mkdir()
    rng = torch.Generator().manual_seed(0)
    for i in range(12):
        pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=rng)
        Image.fromarray(pixels.numpy()).save(f"photos/{i:02d}.png")
    for i in (3, 7):
        path = Path(f"photos/{i:02d}.png")
        path.write_bytes(path.read_bytes()[:60])
    arguments = tiny.arguments(data="photos", batch_size=4, steps=2)
    assert command.run(lambda: train.main(arguments)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: 2 of 12 images cannot be read: cannot decode photos/03.png: ")
    assert "photos/07.png" in said
    assert not Path("runs").exists()
    assert command.run(lambda: train.main([*arguments, "--skip-damaged"])) == 0
    assert "2 of 12 images are damaged and left out: cannot decode photos/03.png" in caplog.text
    assert training_run.read_run(Path("runs/digits")).contents["n_images"] == 10


def test_a_subset_says_how_exact_it_is(monkeypatch, caplog):
    monkeypatch.setattr(schedule, "EXACT_LIMIT", 30)
    config = tiny.train_config(sigma_begin=0.0)
    with caplog.at_level(logging.INFO):
        found = train.resolve_ladder(config, MemoryImages(tiny.IMAGES))
    chosen = schedule.compared_images(40, 64, config.seed)
    assert found.sigma_begin == schedule.max_pairwise_distance(tiny.IMAGES[chosen])
    assert "among 30 of the 40 images, chosen at random: with 95 % confidence" in caplog.text
    assert "at most 18 % of all pairs" in caplog.text


def test_what_a_run_writes(in_tmp, capsys):
    arguments = tiny.arguments(steps=5, snapshot_every=1, keep=2, grid=4, log_every=2)
    assert train.main(arguments) == 0
    assert "python -m ncsn_fast.sample --model runs/digits" in capsys.readouterr().out
    run = in_tmp / "runs" / "digits"
    names = [path.name for path in training_run.checkpoint_paths(run)]
    assert names == ["step_00000004.pt", "step_00000005.pt"]
    assert len(list((run / "checkpoints").iterdir())) == 2
    settings = json.loads((run / "config.json").read_text())
    expected = tiny.train_config(
        steps=5, snapshot_every=1, keep=2, grid=4, log_every=2,
        epsilon=ncsn_fast.load(run).config.epsilon,
    )  # fmt: skip
    assert settings == json.loads(json.dumps(dataclasses.asdict(expected)))  # tuples are lists
    assert len(list((run / "samples").glob("*.png"))) == 5
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"loss", "images_per_s", "lr"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("loss_by_level/") for tag in events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert [event.step for event in events.Images("samples")] == [1, 2, 3, 4, 5]
    assert ncsn_fast.load(run).image_shape == (1, 8, 8)


def test_a_second_run_never_overwrites_the_first(in_tmp, caplog):
    assert [train.main(tiny.arguments(seed=seed)) for seed in range(3)] == [0, 0, 0]
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [line for line in said if "exists" in line] == [
        f"runs/digits exists: this is a new run, in runs/digits-{number}. To continue runs/digits "
        "instead, stop this one and add --resume to the command."
        for number in (2, 3)
    ]
    runs = sorted(path.name for path in (in_tmp / "runs").iterdir())
    assert runs == ["digits", "digits-2", "digits-3"]
    seeds = [json.loads((in_tmp / "runs" / n / "config.json").read_text())["seed"] for n in runs]
    assert seeds == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [("cuda:99", "cuda:99"), ("tpu!", "must be auto, cpu, cuda or cuda:N; got 'tpu!'")],
)
def test_device_that_is_not_there(name, text):
    with pytest.raises(ValueError, match=text):
        train.pick_device(name)
