"""Training: its arithmetic, what it writes, and that stopping it at any moment loses nothing."""

import dataclasses
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ncsn_fast
from ncsn_fast import SamplingError, checkpoint, cli, data, sigmas, train, trainer
from ncsn_fast.data import DataError, MemoryImages
from ncsn_fast.objectives import denoising_score_matching
from ncsn_fast.trainer import Journal, LevelLosses, Trainer, TrainingError

CPU = torch.device("cpu")
IMAGES = torch.randint(
    256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def new_trainer(**changes) -> Trainer:
    config = tiny.train_config(**changes)
    return Trainer(config, train.resolve_ladder(config, MemoryImages(IMAGES)), CPU)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(a, b) -> bool:
    """Equality of nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(itertools.starmap(same, zip(a, b, strict=True)))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_average_follows_its_recursion():
    t = new_trainer(ema=0.9)
    average = weights(t.model)
    for _ in range(4):
        t.train_step(IMAGES[:8])
        average = {k: 0.9 * average[k] + 0.1 * v for k, v in weights(t.model).items()}
    for name, weight in weights(t.averaged()).items():
        torch.testing.assert_close(weight, average[name], rtol=1e-5, atol=1e-7)
    assert not same(weights(t.averaged()), weights(t.model))
    assert new_trainer(ema=0.0).averaged().training  # no average: the model itself


def test_step_is_adam_on_the_mean_loss():
    t, by_hand = new_trainer(adam_eps=1e-3, warmup=0, lr=0.01, ema=0), new_trainer(ema=0)
    level, losses = t.train_step(IMAGES[:8])
    generator = torch.Generator().manual_seed(0)
    expected_level = torch.randint(4, (8,), generator=generator)
    assert torch.equal(level, expected_level)
    model, x = by_hand.model, IMAGES[:8] / 255
    noise = torch.randn(x.shape, generator=generator)
    expected = denoising_score_matching(model.score_at, x, model.sigmas, level, noise)
    torch.testing.assert_close(losses, expected.detach())
    expected.mean().backward()
    for ours, theirs in zip(t.model.parameters(), model.parameters(), strict=True):
        step = 0.01 * theirs.grad / (theirs.grad.abs() + 1e-3)  # Adam's first step
        torch.testing.assert_close(ours.data, theirs.data - step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [False, True])
def test_learning_rate(decay):
    t = new_trainer(lr=0.5, warmup=4, steps=20, decay=decay)
    rates = []
    for t.step in (0, 1, 3, 4, 10, 20):
        rates.append(t.learning_rate())
    cosine = [0.5 * (1 + math.cos(math.pi * s / 20)) if decay else 1 for s in (0, 1, 3, 4, 10, 20)]
    warm = [0.25, 0.5, 1, 1, 1, 1]
    assert rates == pytest.approx([0.5 * w * c for w, c in zip(warm, cosine, strict=True)])
    t.step = 1
    t.train_step(IMAGES[:8])
    assert t.optimizer.param_groups[0]["lr"] == pytest.approx(rates[1])


def test_gradient_clipping():
    def norm(t: Trainer) -> float:
        t.train_step(IMAGES[:8])
        grads = [p.grad for p in t.model.parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in grads]).norm())

    free = norm(new_trainer())
    assert norm(new_trainer(grad_clip=free / 3)) == pytest.approx(free / 3, rel=1e-4)
    assert norm(new_trainer(grad_clip=free * 3)) == pytest.approx(free, rel=1e-6)


def test_autocast_keeps_weights_and_loss_in_float32():
    t, full = new_trainer(autocast=True), new_trainer()
    _, losses = t.train_step(IMAGES[:8])
    _, exact = full.train_step(IMAGES[:8])
    assert losses.dtype == torch.float32
    assert {w.dtype for w in t.model.parameters()} == {torch.float32}
    assert 0 < ((losses - exact).norm() / exact.norm()) < 0.03


def test_flips_and_dequantisation():
    ramp = torch.arange(0, 240, 30, dtype=torch.uint8).expand(2000, 1, 8, 8)
    assert torch.equal(new_trainer().prepare(ramp), ramp / 255)
    flipped = new_trainer(flip=True).prepare(ramp)
    is_flipped = flipped[:, 0, 0, 0] > 0.5
    assert torch.equal(flipped[~is_flipped], (ramp / 255)[~is_flipped])
    assert torch.equal(flipped[is_flipped], (ramp / 255).flip(3)[is_flipped])
    assert abs(float(is_flipped.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(2000)
    u = new_trainer(dequantise=True).prepare(ramp) * 256 - ramp
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
    t = new_trainer(lr=5e-3)
    digits = data.digits("train", 8)[0]
    losses = [t.train_step(digits[(8 * i) % 1400 :][:8])[1].mean() for i in range(80)]
    assert torch.stack(losses[-20:]).mean() < 0.75 * torch.stack(losses[:10]).mean()


def test_a_ladder_is_derived_from_the_data(caplog):
    images = MemoryImages(IMAGES)
    config = tiny.train_config(sigma_begin=0.0, n_sigmas=0, epsilon=0.0)
    with caplog.at_level(logging.INFO):
        found = train.resolve_ladder(config, images)
    expected = sigmas.derive(IMAGES, n_steps_each=5)
    assert (found.sigma_begin, found.n_sigmas) == (expected.sigma_begin, expected.n_sigmas)
    assert found.epsilon == pytest.approx(expected.epsilon)
    assert found.sigma_begin == pytest.approx(
        float(torch.cdist(*[IMAGES.flatten(1).double() / 255] * 2).max())
    )
    assert f"in {expected.n_sigmas} levels" in caplog.text
    given = tiny.train_config(sigma_begin=3.0, n_sigmas=7, epsilon=1e-5)
    kept = train.resolve_ladder(given, images)
    assert (kept.sigma_begin, kept.n_sigmas, kept.epsilon) == (3.0, 7, 1e-5)


def test_what_a_run_writes(in_tmp, capsys):
    arguments = tiny.arguments(steps=5, snapshot_every=1, keep=2, grid=4, log_every=2)
    assert train.main(arguments) == 0
    assert "python -m ncsn_fast.sample --model runs/digits" in capsys.readouterr().out
    run = in_tmp / "runs" / "digits"
    names = [path.name for path in checkpoint.checkpoint_paths(run)]
    assert names == ["step_00000004.pt", "step_00000005.pt"]
    assert len(list((run / "checkpoints").iterdir())) == 2
    settings = json.loads((run / "config.json").read_text())
    assert settings == dataclasses.asdict(
        tiny.train_config(steps=5, snapshot_every=1, keep=2, grid=4, log_every=2)
    )
    assert len(list((run / "samples").glob("*.png"))) == 5
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"loss", "images_per_s", "lr"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("loss_by_level/") for tag in events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert [event.step for event in events.Images("samples")] == [1, 2, 3, 4, 5]
    assert ncsn_fast.load(run).image_shape == (1, 8, 8)


def test_a_second_run_never_overwrites_the_first(in_tmp):
    assert [train.main(tiny.arguments(seed=seed)) for seed in range(3)] == [0, 0, 0]
    runs = sorted(path.name for path in (in_tmp / "runs").iterdir())
    assert runs == ["digits", "digits-2", "digits-3"]
    seeds = [json.loads((in_tmp / "runs" / n / "config.json").read_text())["seed"] for n in runs]
    assert seeds == [0, 1, 2]


def finished(name: str) -> dict:
    contents = checkpoint.read_run(Path("runs") / name).contents
    return {key: value for key, value in contents.items() if key != "train_config"}


@pytest.mark.parametrize("extra", [{"ema": 0.9}, {"ema": 0.0, "norm": "BatchNorm", "grid": 1}])
def test_resumed_is_bit_for_bit_uninterrupted(in_tmp, extra):
    settings = {"snapshot_every": 5, "batch_size": 100, **extra}  # epochs of 14 steps
    switches = ["--flip", "--dequantise"]
    whole = tiny.arguments(name="whole", steps=20, **settings)
    half = tiny.arguments(name="half", steps=10, **settings)
    rest = tiny.arguments(name="half", steps=20, **settings)
    assert train.main(whole + switches) == 0
    assert train.main([*half, *switches, "--resume"]) == 0  # resuming nothing starts it
    assert train.main([*rest, *switches, "--resume"]) == 0
    assert finished("half")["step"] == 20
    assert same(finished("half"), finished("whole"))
    assert train.main([*rest, *switches, "--resume"]) == 0  # nothing left to do
    assert same(finished("half"), finished("whole"))


def test_other_settings_are_refused_on_resume(in_tmp):
    assert train.main(tiny.arguments()) == 0
    more = tiny.arguments(steps=6)
    with pytest.raises(TrainingError, match=r"batch_size was 8, is 4.*new --name"):
        train.main([*tiny.arguments(batch_size=4, steps=6), "--resume"])
    with pytest.raises(TrainingError, match=r"decay was False, is True, steps was 4, is 6"):
        train.main([*more, "--decay", "--resume"])
    remedy = ["--lr", "1e-5", "--grad-clip", "1", "--resume"]
    assert train.main([*more, *remedy]) == 0
    assert finished("digits")["step"] == 6


def test_interrupt_saves_and_can_be_resumed(in_tmp, monkeypatch, capsys):
    step = Trainer.train_step

    def interrupted(self, images):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, images)

    assert train.main(tiny.arguments(name="whole", steps=6)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert cli.run(lambda: train.main(tiny.arguments(steps=6))) == 130
    assert "stopped and saved: runs/digits" in capsys.readouterr().out
    assert checkpoint.read_run(Path("runs/digits")).step == 3
    assert train.main([*tiny.arguments(steps=6), "--resume"]) == 0
    assert same(finished("digits"), finished("whole"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nan_loss_names_step_and_level(in_tmp, monkeypatch, capsys):
    step = Trainer.train_step

    def poisoned(self, images):
        if self.step == 3:
            self.model.net.end_conv.bias.data.fill_(math.nan)
        return step(self, images)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    assert cli.run(lambda: train.main(tiny.arguments(steps=9, snapshot_every=2))) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the loss is nan at step 3, level ")
    assert "--lr" in said
    assert checkpoint.read_run(Path("runs/digits")).step == 2


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    t = new_trainer()
    journal = Journal(tmp_path, t.config)
    journal.save(t)
    t.step, t.model.net.end_conv.bias.data[0] = 1, math.inf
    with pytest.raises(
        TrainingError, match=r"net\.end_conv\.bias is no longer finite after step 1"
    ):
        journal.save(t)
    assert checkpoint.read_run(tmp_path).step == 0


def test_a_model_that_cannot_sample_yet_goes_on(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise SamplingError("sample 0 is no longer finite")

    monkeypatch.setattr(trainer.Sampler, "sample", fail)
    t = new_trainer(grid=4)
    Journal(tmp_path, t.config).sample(t)
    assert "no samples at step 0: sample 0 is no longer finite" in caplog.text


class Breaking:
    """Twenty images, one of which cannot be read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7:
            raise DataError("cannot decode image 7.png")
        return IMAGES[index]


def test_a_corrupt_image_costs_no_step(tmp_path):
    t = new_trainer(batch_size=1, steps=100, snapshot_every=1000)
    with pytest.raises(DataError, match=r"7\.png"):
        train.fit(t, Breaking(), Journal(tmp_path, t.config), progress=False)
    assert 0 < checkpoint.read_run(tmp_path).step == t.step < 20


def test_full_disk_keeps_the_last_checkpoint(tmp_path, full_disk):
    t = new_trainer()
    journal = Journal(tmp_path, t.config)
    journal.save(t)
    t.train_step(IMAGES[:8])
    with full_disk(10_000), pytest.raises(OSError, match=r"cannot write .*step_00000001\.pt.*room"):
        journal.save(t)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000000.pt"]
    assert checkpoint.read_run(tmp_path).step == 0


def test_checkpoint_of_another_network():
    state = new_trainer().state_dict()
    with pytest.raises(TrainingError, match="does not fit this run"):
        new_trainer(ngf=6).load_state_dict(state)
    with pytest.raises(TrainingError, match="does not fit this run"):
        new_trainer(ema=0.9).load_state_dict({**state, "ema": None})


@pytest.mark.parametrize(
    ("name", "text"),
    [("cuda:99", "cuda:99"), ("tpu!", "must be auto, cpu, cuda or cuda:N; got 'tpu!'")],
)
def test_device_that_is_not_there(name, text):
    with pytest.raises(ValueError, match=text):
        train.pick_device(name)


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Where processes start fast: forked from a clean one that has imported the trainer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ncsn_fast.train", "tiny"])
    return context


def start(processes: BaseContext) -> BaseProcess:
    """Resumes a run that saves at every step; returns once it has saved again."""
    before = checkpoint.checkpoint_paths(Path("runs/digits"))[-1:]
    arguments = [*tiny.arguments(steps=10**6, snapshot_every=1, threads=1), "--resume"]
    process = processes.Process(target=tiny.run_trainer, args=(arguments,))
    process.start()
    while checkpoint.checkpoint_paths(Path("runs/digits"))[-1:] == before and process.is_alive():
        time.sleep(0.01)
    assert process.is_alive()
    return process


def test_killed_at_any_moment_and_interrupted(in_tmp, processes):
    run, reached, moment = Path("runs/digits"), 0, random.Random(0)
    for _ in range(5):
        process = start(processes)
        time.sleep(moment.random() * 0.2)
        process.kill()
        process.join()
        saved = checkpoint.read_run(run)
        assert saved.step > reached
        saved.model()
        reached = saved.step
    process = start(processes)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert checkpoint.read_run(run).step > reached
    assert not [p for p in (run / "checkpoints").iterdir() if p.suffix == ".tmp"]
