"""Command `python -m ncsn_fast.train`: score matching in plain PyTorch."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("train"))

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli.outputs import check_output_folder
from ncsn_fast.cli.shard import Shard
from ncsn_fast.cli.shards import DistributedState, distributed
from ncsn_fast.cli.train_options import TrainOptions, parse
from ncsn_fast.data import datasets, files
from ncsn_fast.data.held_out import hold_out
from ncsn_fast.data.kept import keep
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.models.score import ModelConfig, ScoreModel, config_from_dict
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.training import toy
from ncsn_fast.training.configs import ToyOptions, TrainConfig
from ncsn_fast.training.fit import TIME_IS_UP, fit, resume_options, stop_requests
from ncsn_fast.training.journal import Journal
from ncsn_fast.training.ladder import n_classes, resolve_ladder
from ncsn_fast.training.pace import unreached
from ncsn_fast.training.ranks import Ranks
from ncsn_fast.training.trainer import Trainer, TrainingError

log = logging.getLogger("ncsn_fast.train")

# Fields that may change when a run is resumed: where, how fast and how long it runs, the two
# remedies for a loss that became NaN, and whether the learning rate decays to the end.
FREE_ON_RESUME = {
    "name", "runs", "data", "workers", "steps", "device", "threads", "log_every",
    "snapshot_every", "keep", "grid", "lr", "decay", "grad_clip", "autocast", "compile",
    "accumulate", "max_minutes",
}  # fmt: skip


def pick_device(name: str) -> torch.device:
    """Returns the torch.device of `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: another name, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but torch sees no NVIDIA GPU; use --device cpu"
        )
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ValueError(
            f"there is no device {name!r}: GPUs are 0 to {torch.cuda.device_count() - 1}"
        )
    return device


def new_run_folder(config: TrainConfig | ToyOptions) -> Path:
    """Creates <runs>/<name>, or the first of <name>-2, <name>-3, ... that does not exist.

    A warning says so where it is not the first.
    """
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"-{number}"
        folder = Path(config.runs) / f"{config.name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        if number > 1:
            _warn_of_other_name(Path(config.runs) / config.name, folder)
        return folder
    raise AssertionError


def _warn_of_other_name(asked: Path, taken: Path) -> None:
    """Warns that a run is a new one beside that of its name, and says how to continue that."""
    again = ""
    if training_run.is_run(asked):
        again = f" To continue {asked} instead, stop this one and add --resume to the command."
    log.warning("%s exists: this is a new run, in %s.%s", asked, taken, again)


def check_same_run(config: TrainConfig, saved: dict[str, Any], run: Path) -> None:
    """Raises TrainingError if `config` differs from that of the run to resume."""
    now = json.loads(config.to_json())  # tuples as lists, as in the file
    changed = [k for k in now if k not in FREE_ON_RESUME and k in saved and saved[k] != now[k]]
    if config.decay and saved.get("decay") and saved.get("steps") != config.steps:
        changed.append("steps")
    if changed:
        differences = ", ".join(f"{k} was {saved[k]!r}, is {now[k]!r}" for k in changed)
        raise TrainingError(
            f"{run} cannot be resumed with other settings ({differences}); start a new --name"
        )


def check_same_data(now: int, then: int | None, run: Path) -> None:
    """Raises TrainingError if the size of the data set has changed since the run was saved."""
    if then is not None and then != now:
        raise TrainingError(
            f"{run} was trained on {then} images, and the data now has {now}: batches would come "
            "in another order. Restore the data, or start a new --name"
        )


def check_same_classes(now: int, then: int, run: Path) -> None:
    """Raises TrainingError if a run's network has another number of classes than the data."""
    if now != then:
        raise TrainingError(
            f"the network of {run} has {then} classes, and the data with these settings {now}: "
            "restore the data and the settings, or start a new --name"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run knows before its first step.

    Attributes:
        run: its folder, if it is resumed or the name is free.
        images: those to train on.   held_out: those whose loss is only looked at.
        saved: checkpoint to resume from.
    """

    run: Path
    images: datasets.Images
    held_out: datasets.MemoryImages
    model_config: ModelConfig | UNetConfig
    saved: training_run.RunCheckpoint | None

    def resolved(self, config: TrainConfig) -> TrainConfig:
        """Returns the configuration with the noise levels and step size that were derived."""
        found = self.model_config
        return dataclasses.replace(
            config,
            sigma_begin=found.sigma_begin,
            sigma_end=found.sigma_end,
            n_sigmas=found.n_sigmas,
            epsilon=found.epsilon,
        )


def make_plan(
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Plan:
    """Opens the data and resolves the noise levels, or reads the checkpoint to resume from.

    Of several ranks, the main one derives the noise levels. DataError and TrainingError, before
    anything is written, say that the data are not those of the network or the run.
    """
    ranks = ranks or Ranks()
    run = Path(config.runs) / config.name
    check_output_folder("--runs", run)
    if events := unreached(config, config.steps):
        log.warning("the run ends at step %d, before %s", config.steps, " and ".join(events))
    images: datasets.Images = datasets.MemoryImages(
        torch.empty(0, config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    )
    if config.data:
        images = datasets.open_images(
            config.data,
            size=config.image_size,
            channels=config.channels,
            centre_crop=config.centre_crop,
            background=config.background,
        )
    images = keep(
        images,
        (config.channels, config.image_size, config.image_size),
        skip_damaged=config.skip_damaged,
        workers=config.workers,
        progress=progress,
    )
    classes = n_classes(config, images)
    images, held_out = hold_out(images, config.held_out, config.seed)
    if not (resume and training_run.is_run(run)):
        text = ""
        if ranks.main:
            text = json.dumps(resolve_ladder(config, images, progress=progress).to_dict())
        found = config_from_dict(json.loads(ranks.text(text)))
        return Plan(run, images, held_out, found, None)
    saved = training_run.read_run(run)
    check_same_run(config, saved.train_config, run)
    check_same_data(len(images), saved.contents.get("n_images"), run)
    check_same_classes(classes, saved.model_config.n_classes, run)
    return Plan(run, images, held_out, saved.model_config, saved)


READ = 16  # images that a dry run reads


def dry_run(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> None:
    """Prints the resolved configuration as JSON, and logs what the run would do."""
    device = pick_device(config.device)
    plan = make_plan(config, resume=resume, progress=progress)
    n = len(plan.images)
    for i in range(0, n, max(1, n // READ)):
        plan.images[i]
    with torch.device("meta"):
        model = ScoreModel(plan.model_config)
    size = sum(p.numel() for p in model.parameters())
    flop = 3 * network_flop(model) * config.batch_size * config.steps
    seen = config.batch_size * config.steps
    log.info("network %s: %.2f M parameters, on %s", config.arch, size / 1e6, device)
    log.info(
        "%d steps of %d images: about %.3g TFLOP (forward and backward, convolutions only)",
        config.steps, config.batch_size, flop / 1e12,
    )  # fmt: skip
    if n:
        log.info(
            "%d images, %d steps an epoch: %.3g epochs", n, max(1, n // config.batch_size), seen / n
        )
    else:
        log.info("no --data, which the run itself needs")
    begins = f"resumes {plan.run} at step {plan.saved.step}" if plan.saved else f"starts {plan.run}"
    log.info("the run %s, and saves every %d steps", begins, config.snapshot_every)
    print(plan.resolved(config).to_json())


def join(state: DistributedState, device: torch.device) -> Ranks:
    """Returns the ranks of a launch: gloo for numbers of the host, NCCL for gradients on GPUs."""
    if state.group is None:
        return Ranks()
    on_gpu = dist.new_group(backend="nccl") if device.type == "cuda" else None
    return Ranks(state.shard.index, state.shard.count, state.group, on_gpu)


def check_ranks(config: TrainConfig, n: int, ranks: Ranks) -> None:
    """Raises UsageError unless every rank has an image of every batch of n images."""
    batch = min(config.batch_size, n)
    if batch < ranks.count:
        raise command.UsageError(
            f"a batch of {batch} images cannot be shared by {ranks.count} ranks: start fewer, or "
            "take a larger --batch-size"
        )


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    state: DistributedState | None = None,
) -> tuple[Path, int | None]:
    """Runs (or resumes) training; returns its folder, and the signal that stopped it or None."""
    if config.threads:
        torch.set_num_threads(config.threads)
    state = state or DistributedState(Shard())
    asked = state.device("eager", None if config.device == "auto" else config.device)
    device = pick_device(asked or config.device)
    ranks = join(state, device)
    progress = progress and ranks.main
    plan = make_plan(config, resume=resume, progress=progress, ranks=ranks)
    run, images = plan.run, plan.images
    check_ranks(config, len(images), ranks)
    trainer = Trainer(config, plan.model_config, device, ranks)
    if plan.saved is not None:
        trainer.load_state_dict(plan.saved.contents)
        log.info("resuming %s at step %d of %d", run, trainer.step, config.steps)
    elif not resume:
        run = Path(ranks.text(str(new_run_folder(config)) if ranks.main else ""))
    trainer.n_images = len(images)
    size = sum(p.numel() for p in trainer.model.parameters())
    log.info(
        "training %s: %d images, %.2f M parameters, on %s%s",
        run, len(images), size / 1e6, device,
        f", {ranks.count} ranks that share batches of {config.batch_size}" * (ranks.count > 1),
    )  # fmt: skip
    journal = None
    if ranks.main:
        with files.atomic_write(run / "config.json") as path:
            path.write_text(plan.resolved(config).to_json() + "\n")
        journal = Journal(run, config, trainer.step)
        if plan.saved is not None:
            journal.sample_again(trainer)
    return run, fit(trainer, images, journal, held_out=plan.held_out, progress=progress)


def train_toy(options: ToyOptions) -> int:
    """Trains and draws the toy; if interrupted, draws what was learnt so far."""
    toy.figure_class()  # before the folder is made
    check_output_folder("--runs", Path(options.runs) / options.name)
    run = new_run_folder(options)
    with stop_requests() as stop:
        finished, figures = toy.train_and_draw(options, run, stop)
    for name, figure in figures.items():
        print(f"{name}: {figure:.3f}")
    print(f"{'trained' if finished else 'stopped and drawn'}: {run}/fields.png, samples.png")
    return 0 if finished else 128 + stop[0]


def run(options: TrainOptions | ToyOptions) -> int:
    """Does what the options say.

    Returns:
        exit code: 0 when finished, 130 or 143 when stopped by Ctrl-C or SIGTERM (and saved).
    """
    if isinstance(options, ToyOptions) or options.dry_run:
        command.single_process("ncsn_fast.train, of the toy or with --dry-run,")
    if isinstance(options, ToyOptions):
        if options.dry_run:
            print(options.to_json())
            return 0
        return train_toy(options)
    if options.dry_run:
        dry_run(options.config, resume=options.resume)
        return 0
    with distributed(None, "train in one process, without torchrun") as state:
        folder, stopped = train(options.config, resume=options.resume, state=state)
        if state.is_main_process:
            print(_report(folder, stopped, options.config))
    return 128 + stopped if stopped else 0


def _report(folder: Path, stopped: int | None, config: TrainConfig) -> str:
    """Returns what a run says at its end."""
    sample = (
        f"sample from it: python -m ncsn_fast.sample --model {folder} --method fast --out grid.png"
    )
    if stopped is None:
        return f"trained: {folder}\n{sample}"
    reason = f" after {config.max_minutes:g} minutes" if stopped == TIME_IS_UP else ""
    return (
        f"stopped{reason} and saved: {folder}\n{sample}\n"
        f"continue with: the same command and {resume_options(folder, config)}"
    )


def main(args: list[str] | None = None) -> int:
    """Runs the command; returns the exit code of `run`."""
    return run(parse(args))
