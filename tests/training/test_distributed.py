"""Ranks that train one model: the same model, up to the order of sums, as one process."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from ncsn_fast import train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli import command
from ncsn_fast.cli.command import UsageError
from ncsn_fast.training.objective import Objective
from ncsn_fast.training.ranks import Ranks

SETTINGS = {
    "lr": 0.01, "adam_eps": 1.0, "ema": 0.9, "batch_size": 7, "log_every": 1, "snapshot_every": 1,
    "keep": 9, "held_out": 5,
}  # fmt: skip
SWITCHES = ["--flip", "--dequantise", "--grad-clip", "1"]
PATIENCE = 120  # seconds


def rank_of_two(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    """Runs the command as one of two ranks."""
    launch = {
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in launch.items()})
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(command.run(lambda: train.main(arguments)))


def two_ranks(folder: Path, arguments: list[str]) -> list[int]:
    """Returns the exit codes of two ranks that run the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ncsn_fast.train", "tiny", "torch._dynamo"])
    made = [
        context.Process(target=rank_of_two, args=(rank, port, folder, arguments))
        for rank in range(2)
    ]
    for process in made:
        process.start()
    for process in made:
        process.join(PATIENCE)
    return [process.exitcode for process in made]


def states(folder: Path) -> list[dict]:
    """Returns the checkpoints of a run, one a step."""
    return [
        training_run.read_run_file(path).contents for path in training_run.checkpoint_paths(folder)
    ]


def weights(state: dict) -> torch.Tensor:
    both = [*state["model"].values(), *state["ema"].values()]
    return torch.cat([tensor.flatten() for tensor in both])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder with the runs `one`, of one process, and `two`, of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    assert two_ranks(folder, [*tiny.arguments(name="two", **SETTINGS), *SWITCHES]) == [0, 0]
    one = [*tiny.arguments(name="one", runs=str(folder / "runs"), **SETTINGS), *SWITCHES]
    assert train.main(one) == 0
    return folder / "runs"


def test_two_ranks_train_the_model_of_one_process(runs):
    one, two = states(runs / "one"), states(runs / "two")
    assert [state["step"] for state in two] == [state["step"] for state in one] == [1, 2, 3, 4]
    first = weights(one[0])
    for a, b in zip(one, two, strict=True):
        moved = (weights(a) - first).norm() or first.norm()
        # Adam's epsilon of 1 keeps a step proportional to its gradient, so that rounding stays so.
        assert (weights(a) - weights(b)).norm() < 1e-3 * moved


def test_micro_batches_train_the_model_of_whole_batches(runs):
    one = [*tiny.arguments(name="parts", runs=str(runs), accumulate=3, **SETTINGS), *SWITCHES]
    assert train.main(one) == 0
    whole, parts = (weights(states(runs / name)[-1]) for name in ("one", "parts"))
    first = weights(states(runs / "one")[0])
    assert 0 < (whole - parts).norm() < 1e-3 * (whole - first).norm()


def test_one_process_continues_what_two_ranks_began(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "two")
    again = tiny.arguments(name="two", runs=str(tmp_path), **{**SETTINGS, "steps": 6})
    assert train.main([*again, *SWITCHES, "--resume"]) == 0
    assert training_run.read_run(tmp_path / "two").step == 6


def test_only_the_main_rank_writes(runs):
    assert len(list((runs / "two" / "tensorboard").iterdir())) == 1
    assert json.loads((runs / "two" / "config.json").read_text())["batch_size"] == 7


def test_more_ranks_than_images():
    train.check_ranks(tiny.train_config(), 40, Ranks(0, 8))
    with pytest.raises(UsageError, match="a batch of 8 images cannot be shared by 9 ranks"):
        train.check_ranks(tiny.train_config(), 40, Ranks(0, 9))
    with pytest.raises(UsageError, match="a batch of 1 images cannot be shared by 2 ranks"):
        train.check_ranks(tiny.train_config(), 1, Ranks(0, 2))


def test_a_dry_run_is_of_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.run(lambda: train.main(["--dry-run"])) == 2
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_training_is_the_same(runs, monkeypatch):
    """With AOT Autograd in front of eager kernels; Inductor's are PyTorch's to test."""
    monkeypatch.setattr(
        Objective, "compile", lambda self: nn.Module.compile(self, backend="aot_eager")
    )
    one = [*tiny.arguments(name="compiled", runs=str(runs), **SETTINGS), *SWITCHES, "--compile"]
    assert train.main(one) == 0
    whole, compiled = (weights(states(runs / name)[-1]) for name in ("one", "compiled"))
    first = weights(states(runs / "one")[0])
    assert (whole - compiled).norm() < 1e-3 * (whole - first).norm()


@pytest.mark.slow
def test_two_ranks_train_with_the_classes_of_their_images(tmp_path):
    small = {
        "config": "edm-cifar10", "data": "digits", "channels": 1, "ngf": 8, "n_blocks": 1,
        "attention": 4, "dropout": 0, "label_dropout": 0.25, "workers": 0, "ema": 0.9,
    }  # fmt: skip
    settings = tiny.arguments(**{**SETTINGS, **small, "steps": 3, "warmup": 0, "sigma_begin": 0})
    settings += ["--multiples", "1", "2", "--class-cond"]
    assert two_ranks(tmp_path, [*settings, "--name", "two"]) == [0, 0]
    assert train.main([*settings, "--name", "one", "--runs", str(tmp_path / "runs")]) == 0
    one, two = (weights(states(tmp_path / "runs" / name)[-1]) for name in ("one", "two"))
    first = weights(states(tmp_path / "runs" / "one")[0])
    assert (one - two).norm() < 1e-3 * (one - first).norm()
