"""Runs that are resumed, interrupted, killed or that fail: nothing is lost, nothing is changed."""

import copy
import dataclasses
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
from killing import killed_at_each_call

from ncsn_fast import SamplingError, train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli import command
from ncsn_fast.data.datasets import DataError
from ncsn_fast.training import journal as journals
from ncsn_fast.training.journal import Journal
from ncsn_fast.training.trainer import Trainer, TrainingError


def finished(name: str) -> dict:
    contents = training_run.read_run(Path("runs") / name).contents
    return {key: value for key, value in contents.items() if key != "train_config"}


@pytest.mark.parametrize(
    "extra",
    [
        {"ema": 0.9},
        pytest.param({"ema": 0.0, "norm": "BatchNorm", "grid": 1}, marks=pytest.mark.slow),
    ],
)
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
    assert tiny.same(finished("half"), finished("whole"))
    assert train.main([*rest, *switches, "--resume"]) == 0  # nothing left to do
    assert tiny.same(finished("half"), finished("whole"))


def test_a_grid_that_a_kill_prevented_is_drawn_on_resume(in_tmp):
    arguments = tiny.arguments(steps=4, snapshot_every=2, grid=1)
    assert train.main(arguments) == 0
    first, last = (Path(f"runs/digits/samples/step_{step:08d}.png") for step in (2, 4))
    content = last.read_bytes()
    last.unlink()
    (last.parent / f".{last.name}.x1_y.tmp").write_bytes(content[:20])
    assert train.main([*arguments, "--resume"]) == 0
    assert last.read_bytes() == content
    assert sorted(last.parent.iterdir()) == [first, last]
    kept = first.stat().st_mtime_ns, last.stat().st_mtime_ns
    assert train.main([*arguments, "--resume"]) == 0
    assert (first.stat().st_mtime_ns, last.stat().st_mtime_ns) == kept


def test_other_settings_are_refused_on_resume(in_tmp):
    assert train.main(tiny.arguments()) == 0
    more = tiny.arguments(steps=6)
    with pytest.raises(TrainingError, match=r"batch_size was 8, is 4.*new --name"):
        train.main([*tiny.arguments(batch_size=4, steps=6), "--resume"])
    remedy = ["--lr", "1e-5", "--grad-clip", "1", "--resume"]
    assert train.main([*more, *remedy]) == 0
    assert finished("digits")["step"] == 6


def test_a_run_can_end_with_a_decay_whose_length_is_then_fixed(in_tmp):
    assert train.main(tiny.arguments()) == 0
    assert train.main([*tiny.arguments(steps=6), "--decay", "--resume"]) == 0
    assert finished("digits")["step"] == 6
    with pytest.raises(TrainingError, match=r"steps was 6, is 8.*new --name"):
        train.main([*tiny.arguments(steps=8), "--decay", "--resume"])
    assert train.main([*tiny.arguments(steps=8), "--resume"]) == 0
    assert finished("digits")["step"] == 8


def test_other_data_are_refused_on_resume(in_tmp, monkeypatch):
    assert train.main(tiny.arguments()) == 0
    digits = train.datasets.open_images("digits", size=8, channels=1)
    fewer = train.datasets.MemoryImages(digits.images[:-1])
    monkeypatch.setattr(train.datasets, "open_images", lambda *args, **options: fewer)
    with pytest.raises(TrainingError, match="trained on 1437 images, and the data now has 1436"):
        train.main([*tiny.arguments(steps=6), "--resume"])


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_can_be_resumed(in_tmp, monkeypatch, capsys, asked):
    step, before = Trainer.step_on, signal.getsignal(asked)

    def interrupted(self, *batch):
        if self.step == 2:
            os.kill(os.getpid(), asked)
        return step(self, *batch)

    assert train.main(tiny.arguments(name="whole", steps=6)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_on", interrupted)
        assert command.run(lambda: train.main(tiny.arguments(steps=6))) == 128 + asked
    said = capsys.readouterr().out
    first, hint, rest = said[said.index("stopped and saved") :].splitlines()
    assert first == "stopped and saved: runs/digits"
    assert hint.startswith("sample from it: python -m ncsn_fast.sample --model runs/digits ")
    assert rest == "continue with: the same command and --resume"
    assert training_run.read_run(Path("runs/digits")).step == 3
    assert train.main([*tiny.arguments(steps=6), "--resume"]) == 0
    assert tiny.same(finished("digits"), finished("whole"))
    assert signal.getsignal(asked) is before


def test_advice_names_the_folder_that_was_taken(in_tmp, monkeypatch, capsys):
    assert train.main(tiny.arguments()) == 0
    monkeypatch.setattr(train, "fit", lambda *args, **options: signal.SIGINT)
    assert train.main(tiny.arguments()) == 130
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "continue with: the same command and --name digits-2 --resume"


def test_nan_loss_names_step_and_level(in_tmp, monkeypatch, capsys):
    step = Trainer.step_on

    def poisoned(self, *batch):
        if self.step == 3:
            self.model.net.end_conv.bias.data.fill_(math.nan)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step_on", poisoned)
    assert command.run(lambda: train.main(tiny.arguments(steps=9, snapshot_every=2))) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the loss is nan at step 3, level ")
    assert said.endswith(
        ". step_00000002.pt is intact: repeat the command with --resume and a smaller --lr, or "
        "with --grad-clip 1"
    )
    assert training_run.read_run(Path("runs/digits")).step == 2


def test_nan_before_the_first_checkpoint_promises_none(in_tmp, monkeypatch, capsys):
    losses = Trainer._losses

    def poisoned(self, *batch):
        level, found = losses(self, *batch)
        return level, found * math.nan

    monkeypatch.setattr(Trainer, "_losses", poisoned)
    assert command.run(lambda: train.main(tiny.arguments())) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        "Nothing was saved yet: start again with a smaller --lr, or with --grad-clip 1"
    )


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    t = tiny.trainer()
    journal = Journal(tmp_path, t.config)
    journal.save(t)
    t.step, t.model.net.end_conv.bias.data[0] = 1, math.inf
    with pytest.raises(
        TrainingError, match=r"net\.end_conv\.bias is no longer finite after step 1"
    ):
        journal.save(t)
    assert training_run.read_run(tmp_path).step == 0


def test_a_model_that_cannot_sample_yet_goes_on(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise SamplingError("sample 0 is no longer finite")

    monkeypatch.setattr(journals.Sampler, "sample", fail)
    t = tiny.trainer(grid=4)
    Journal(tmp_path, t.config).sample(t)
    assert "no samples at step 0: sample 0 is no longer finite" in caplog.text


class Breaking:
    """Twenty images, one of which cannot be read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7:
            raise DataError("cannot decode image 7.png")
        return tiny.IMAGES[index]


def test_a_corrupt_image_costs_no_step(tmp_path):
    t = tiny.trainer(batch_size=1, steps=100, snapshot_every=1000)
    with pytest.raises(DataError, match=r"7\.png") as raised:
        train.fit(t, Breaking(), Journal(tmp_path, t.config), progress=False)
    # Removing the image would make --resume refuse the run (check_same_data).
    for words in (f"saved at step {t.step}; --resume needs 20 images again", "put another picture"):
        assert words in str(raised.value)
    assert 0 < training_run.read_run(tmp_path).step == t.step < 20


def test_full_disk_keeps_the_last_checkpoint(tmp_path, full_disk):
    t = tiny.trainer()
    journal = Journal(tmp_path, t.config)
    journal.save(t)
    t.train_step(tiny.IMAGES[:8])
    with full_disk(10_000), pytest.raises(OSError, match=r"cannot write .*step_00000001\.pt.*room"):
        journal.save(t)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000000.pt"]
    assert training_run.read_run(tmp_path).step == 0


def test_checkpoint_of_another_network():
    state = tiny.trainer().state_dict()
    with pytest.raises(TrainingError, match="does not fit this run"):
        tiny.trainer(ngf=6).load_state_dict(state)
    with pytest.raises(TrainingError, match="does not fit this run"):
        tiny.trainer(ema=0.9).load_state_dict({**state, "ema": None})


def test_an_optimiser_of_something_else_is_refused():
    made = tiny.trainer()
    made.train_step(tiny.IMAGES[:8])
    for change, text in (
        (lambda s: s["param_groups"][0].update(betas=(0.1, "x")), "another betas"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3)), r"exp_avg of shape \(3,\)"),
        (lambda s: s["state"][0]["exp_avg_sq"].fill_(math.nan), "exp_avg_sq of shape"),
        (lambda s: s["state"][0].pop("exp_avg"), "exp_avg"),
        (lambda s: s["state"][0].update(step="x"), "could not convert"),
        (lambda s: s["state"][0].update(step=-1), "must not be negative"),
        (lambda s: s["state"][0]["exp_avg_sq"].neg_(), "must not be negative"),
    ):
        state = made.state_dict()
        state["optimizer"] = copy.deepcopy(state["optimizer"])
        change(state["optimizer"])
        with pytest.raises(TrainingError, match=f"does not fit this run: .*{text}"):
            tiny.trainer().load_state_dict(state)
    tiny.trainer().load_state_dict(made.state_dict())


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Where processes start fast: forked from a clean one that has imported what a run imports."""
    context = multiprocessing.get_context("forkserver")
    late = ["torch._dynamo", "torch.utils.tensorboard", "sklearn.model_selection"]
    context.set_forkserver_preload(["ncsn_fast.train", "tiny", *late])
    return context


def start(processes: BaseContext) -> BaseProcess:
    """Resumes a run that saves at every step; returns once it has saved again."""
    before = training_run.checkpoint_paths(Path("runs/digits"))[-1:]
    arguments = [*tiny.arguments(steps=10**6, snapshot_every=1, threads=1), "--resume"]
    process = processes.Process(target=tiny.run_trainer, args=(arguments,))
    process.start()
    while training_run.checkpoint_paths(Path("runs/digits"))[-1:] == before and process.is_alive():
        time.sleep(0.01)
    assert process.is_alive()
    return process


def test_killed_at_each_call_of_a_save(tmp_path):
    """The run is at its last step or at the one before; resuming clears what was left over."""
    t, checkpoints = tiny.trainer(), tmp_path / "checkpoints"
    config = dataclasses.replace(t.config, keep=1)
    journal = Journal(tmp_path, config)
    t.train_step(tiny.IMAGES[:8])
    journal.save(t)
    before, steps, left = checkpoints / "step_00000001.pt", set(), []
    content = before.read_bytes()
    t.train_step(tiny.IMAGES[8:16])
    for _ in killed_at_each_call(lambda: journal.save(t), tmp_path):
        saved = training_run.read_run(tmp_path)
        saved.model()
        steps.add(saved.step)
        left += [path for path in checkpoints.iterdir() if path.suffix == ".tmp"]
        for path in checkpoints.glob("step_*.pt"):
            path.unlink()
        before.write_bytes(content)
    assert steps == {1, 2}
    assert left
    Journal(tmp_path, config).save(t)
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002.pt"]
    saved = training_run.read_run(tmp_path)
    assert tiny.same(saved.contents["optimizer"], t.optimizer.state_dict())


@pytest.mark.slow
def test_killed_at_any_moment_and_interrupted(in_tmp, processes):
    run, reached, moment = Path("runs/digits"), 0, random.Random(0)
    for _ in range(5):
        process = start(processes)
        time.sleep(moment.random() * 0.2)
        process.kill()
        process.join()
        saved = training_run.read_run(run)
        assert saved.step > reached
        saved.model()
        reached = saved.step
    process = start(processes)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert training_run.read_run(run).step > reached
    assert not [p for p in (run / "checkpoints").iterdir() if p.suffix == ".tmp"]
