"""Command `python -m ncsn_fast.train`: score matching in plain PyTorch."""

from __future__ import annotations

import sys

from ncsn_fast.cli import command

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(command.run_module("train"))

import contextlib
import dataclasses
import itertools
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli.outputs import check_output_folder
from ncsn_fast.cli.train_options import TrainOptions, parse
from ncsn_fast.data import datasets, files
from ncsn_fast.data.loader import batches
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.training import toy
from ncsn_fast.training.configs import ToyOptions, TrainConfig
from ncsn_fast.training.ladder import resolve_ladder
from ncsn_fast.training.trainer import (
    DivergedError,
    Journal,
    LevelLosses,
    Trainer,
    TrainingError,
)

log = logging.getLogger("ncsn_fast.train")

# Fields that may change when a run is resumed: where and how long it runs, and the two remedies for
# a loss that became NaN.
FREE_ON_RESUME = {
    "name", "runs", "data", "workers", "steps", "device", "threads", "log_every",
    "snapshot_every", "keep", "grid", "lr", "grad_clip",
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
    """Creates <runs>/<name>, or the first of <name>-2, <name>-3, ... that does not exist."""
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"-{number}"
        folder = Path(config.runs) / f"{config.name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def check_same_run(config: TrainConfig, saved: dict[str, Any], run: Path) -> None:
    """Raises TrainingError if `config` differs from that of the run to resume."""
    now = dataclasses.asdict(config)
    changed = [k for k in now if k not in FREE_ON_RESUME and k in saved and saved[k] != now[k]]
    if config.decay and saved.get("steps") != config.steps:
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


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM during a run, so that it can stop between two steps."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt  # asked twice: stop at once
        received.append(number)

    # Only the main thread may set handlers.
    main = threading.current_thread() is threading.main_thread()
    asked = (signal.SIGINT, signal.SIGTERM) if main else ()
    previous = {number: signal.signal(number, note) for number in asked}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(
    trainer: Trainer, images: datasets.Images, journal: Journal, *, progress: bool = True
) -> int | None:
    """Trains until config.steps and saves.

    Returns:
        the signal that stopped it before, or None.

    Raises:
        TrainingError: the loss or a weight is no longer finite; the message says how to go on.
    """
    try:
        return _fit(trainer, images, journal, progress)
    except DivergedError as error:
        raise TrainingError(f"{error}. {_remedy(journal.run, trainer.config)}") from error


def _remedy(run: Path, config: TrainConfig) -> str:
    """Returns advice for a run that diverged."""
    gentler = "a smaller --lr, or with --grad-clip 1"
    saved = training_run.checkpoint_paths(run)
    if not saved:
        return f"Nothing was saved yet: start again with {gentler}"
    return (
        f"{saved[-1].name} is intact: repeat the command with {_resume(run, config)} and {gentler}"
    )


def _resume(run: Path, config: TrainConfig) -> str:
    """Returns the options that continue a run; its folder may be that of another name."""
    return "--resume" if run.name == config.name else f"--name {run.name} --resume"


def _fit(trainer: Trainer, images: datasets.Images, journal: Journal, progress: bool) -> int | None:
    config = trainer.config
    stream = batches(
        images, config.batch_size, seed=config.seed, start_step=trainer.step, workers=config.workers
    )
    losses = LevelLosses(trainer.model.config.n_sigmas)
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    )
    saved_at, seen, since = trainer.step, 0, time.perf_counter()
    with stop_requests() as stop, bar, contextlib.closing(journal):
        while trainer.step < config.steps and not stop:
            try:
                batch = next(stream)
            except datasets.DataError as error:
                journal.save(trainer)
                # Without it the data would be another permutation, which check_same_data refuses.
                raise datasets.DataError(
                    f"{error} The run is saved at step {trainer.step}; --resume needs "
                    f"{len(images)} images again, so put another picture in its place."
                ) from error
            losses.add(*trainer.train_step(batch))
            seen += len(batch)
            bar.update()
            if trainer.step % config.log_every == 0:
                rate = seen / (time.perf_counter() - since)
                seen, since = 0, time.perf_counter()
                bar.set_postfix(loss=f"{losses.mean():.3f}", images_per_s=f"{rate:.0f}")
                scalars = {**losses.scalars(), "images_per_s": rate, "lr": trainer.learning_rate()}
                journal.scalars(trainer.step, scalars)
                losses.reset()
            if trainer.step % config.snapshot_every == 0:
                journal.save(trainer)
                journal.sample(trainer)
                saved_at, since, seen = trainer.step, time.perf_counter(), 0
        if saved_at != trainer.step or not training_run.is_run(journal.run):
            journal.save(trainer)
            if not stop:
                journal.sample(trainer)
    return None if trainer.step >= config.steps else stop[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run knows before its first step.

    Attributes:
        run: its folder, if it is resumed or the name is free.
        saved: checkpoint to resume from.
    """

    run: Path
    images: datasets.Images
    model_config: ModelConfig | UNetConfig
    saved: training_run.RunCheckpoint | None

    def resolved(self, config: TrainConfig) -> TrainConfig:
        """Returns the configuration with the noise levels and step size that were derived."""
        found = self.model_config
        return dataclasses.replace(
            config, sigma_begin=found.sigma_begin, n_sigmas=found.n_sigmas, epsilon=found.epsilon
        )


def make_plan(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Plan:
    """Opens the data and resolves the noise levels, or reads the checkpoint to resume from."""
    run = Path(config.runs) / config.name
    check_output_folder("--runs", run)
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
    if not (resume and training_run.is_run(run)):
        return Plan(run, images, resolve_ladder(config, images, progress=progress), None)
    saved = training_run.read_run(run)
    check_same_run(config, saved.train_config, run)
    check_same_data(len(images), saved.contents.get("n_images"), run)
    return Plan(run, images, saved.model_config, saved)


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


def train(
    config: TrainConfig, *, resume: bool = False, progress: bool = True
) -> tuple[Path, int | None]:
    """Runs (or resumes) training; returns its folder, and the signal that stopped it or None."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    plan = make_plan(config, resume=resume, progress=progress)
    run, images = plan.run, plan.images
    trainer = Trainer(config, plan.model_config, device)
    if plan.saved is not None:
        trainer.load_state_dict(plan.saved.contents)
        log.info("resuming %s at step %d of %d", run, trainer.step, config.steps)
    elif not resume:
        run = new_run_folder(config)
    trainer.n_images = len(images)
    with files.atomic_write(run / "config.json") as path:
        path.write_text(plan.resolved(config).to_json() + "\n")
    size = sum(p.numel() for p in trainer.model.parameters())
    log.info(
        "training %s: %d images, %.2f M parameters, on %s", run, len(images), size / 1e6, device
    )
    journal = Journal(run, config, trainer.step)
    if plan.saved is not None:
        journal.sample_again(trainer)
    return run, fit(trainer, images, journal, progress=progress)


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
    command.single_process("ncsn_fast.train")
    if isinstance(options, ToyOptions):
        if options.dry_run:
            print(options.to_json())
            return 0
        return train_toy(options)
    if options.dry_run:
        dry_run(options.config, resume=options.resume)
        return 0
    folder, stopped = train(options.config, resume=options.resume)
    if stopped is None:
        print(
            f"trained: {folder}\n"
            f"sample from it: python -m ncsn_fast.sample --model {folder} --out grid.png"
        )
        return 0
    print(
        f"stopped and saved: {folder}\n"
        f"continue with: the same command and {_resume(folder, options.config)}"
    )
    return 128 + stopped


def main(args: list[str] | None = None) -> int:
    """Runs the command; returns the exit code of `run`."""
    return run(parse(args))
