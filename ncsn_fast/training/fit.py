"""Loop of a training run: steps, log entries, snapshots, and the reasons to stop."""

from __future__ import annotations

import contextlib
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
from ncsn_fast.data.datasets import DataError, Images
from ncsn_fast.data.formats.base import MemoryImages
from ncsn_fast.data.loader import batches, labelled_batches
from ncsn_fast.training.configs import TrainConfig
from ncsn_fast.training.journal import Journal, LevelLosses
from ncsn_fast.training.pace import Pace, foretell
from ncsn_fast.training.trainer import DivergedError, PeerError, Trainer, TrainingError

log = logging.getLogger(__name__)
Batch = tuple[torch.Tensor, torch.Tensor | None]  # images, and their labels
TIME_IS_UP = 0  # in place of the signal that stopped a run


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
    trainer: Trainer,
    images: Images,
    journal: Journal | None,
    *,
    held_out: MemoryImages | None = None,
    progress: bool = True,
) -> int | None:
    """Trains until config.steps and saves.

    Args:
        journal: None in ranks that write nothing.
        held_out: images whose loss is logged at each snapshot.

    Returns:
        the signal that stopped it before, TIME_IS_UP, or None.

    Raises:
        TrainingError: the loss or a weight is no longer finite; the message says how to go on.
    """
    try:
        return _Fit(trainer, images, journal, held_out, progress).run()
    except DivergedError as error:
        advice = "" if journal is None else f". {_remedy(journal.run, trainer.config)}"
        raise TrainingError(f"{error}{advice}") from error


def _remedy(run: Path, config: TrainConfig) -> str:
    """Returns advice for a run that diverged."""
    gentler = "a smaller --lr, or with --grad-clip 1"
    saved = training_run.checkpoint_paths(run)
    if not saved:
        return f"Nothing was saved yet: start again with {gentler}"
    options = resume_options(run, config)
    return f"{saved[-1].name} is intact: repeat the command with {options} and {gentler}"


def resume_options(run: Path, config: TrainConfig) -> str:
    """Returns the options that continue a run; its folder may be that of another name."""
    return "--resume" if run.name == config.name else f"--name {run.name} --resume"


class _Fit:
    """Loop of a run: steps, log entries, snapshots, and the reasons to stop."""

    def __init__(
        self,
        trainer: Trainer,
        images: Images,
        journal: Journal | None,
        held_out: MemoryImages | None,
        progress: bool,
    ) -> None:
        self.trainer, self.images, self.journal = trainer, images, journal
        self.config, self.ranks = trainer.config, trainer.ranks
        self.held_out = held_out or MemoryImages(torch.empty(0, dtype=torch.uint8))
        self.batch = min(self.config.batch_size, len(images))
        self.losses = LevelLosses(trainer.model.config.n_sigmas, trainer.device)
        self.pace, self.foretold = Pace(), False
        self.bar = tqdm(
            total=self.config.steps,
            initial=trainer.step,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )
        self.saved_at, self.seen, self.since = trainer.step, 0, time.perf_counter()

    def run(self) -> int | None:
        trainer, config = self.trainer, self.config
        share = self.ranks.share(self.batch)
        stream = self._batches(share)
        close = (
            contextlib.nullcontext() if self.journal is None else contextlib.closing(self.journal)
        )
        with stop_requests() as received, self.bar, close:
            stopped = False
            while trainer.step < config.steps and not stopped:
                images, labels = self._next(stream)
                try:
                    self.losses.add(*trainer.step_on(images, share, self.batch, labels))
                except PeerError as error:
                    raise self._explained(error) from error
                self.seen += self.batch
                self.bar.update()
                self._foretell()
                if trainer.step % config.log_every == 0:
                    self._log()
                if trainer.step % config.snapshot_every == 0:
                    self._snapshot()
                stopped = self._stopped(bool(received))
            self._finish(stopped)
        if trainer.step >= config.steps:
            return None
        return received[0] if received else TIME_IS_UP

    def _batches(self, share: slice) -> Iterator[Batch]:
        """Returns this rank's shares of the batches from the trainer's step on."""
        options: dict[str, Any] = {
            "seed": self.config.seed, "start_step": self.trainer.step,
            "workers": self.config.workers, "share": share,
        }  # fmt: skip
        if self.trainer.model.n_classes:
            return labelled_batches(self.images, self.config.batch_size, **options)
        return ((batch, None) for batch in batches(self.images, self.config.batch_size, **options))

    def _next(self, stream: Iterator[Batch]) -> Batch:
        try:
            return next(stream)
        except DataError as error:
            if self.journal is None:
                raise
            self.journal.save(self.trainer)
            # Without it the data would be another permutation, which check_same_data refuses.
            n = len(self.images) + len(self.held_out)
            raise DataError(
                f"{error} The run is saved at step {self.trainer.step}; --resume needs {n} images "
                "again, so put another picture in its place."
            ) from error

    def _explained(self, error: PeerError) -> PeerError:
        """Saves what can be saved when another rank has gone; returns the error that says so."""
        if self.journal is None:
            return error
        self.journal.save(self.trainer)
        return PeerError(
            f"{error}. The run is saved at step {self.trainer.step}: continue with the same "
            f"command and {resume_options(self.journal.run, self.config)}"
        )

    def _stopped(self, asked: bool) -> bool:
        """Tells whether to stop after this step; ranks agree about it at every log entry."""
        minutes = self.config.max_minutes
        asked = asked or 0 < minutes <= self.pace.minutes()
        if self.ranks.count == 1:
            return asked
        return self.trainer.step % self.config.log_every == 0 and self.ranks.any(asked)

    def _foretell(self) -> None:
        """Says once how long the run takes, after the first steps."""
        if self.foretold:
            return
        speed = self.pace.seconds_per_step(self.trainer.step)
        if speed is None:
            return
        self.foretold = True
        text, warning = foretell(self.config, self.trainer.step, speed, self.pace.minutes())
        with tqdm.external_write_mode():
            log.info("%s", text)
            if warning:
                log.warning("%s", warning)

    def _log(self) -> None:
        self.trainer.check_losses()
        self.losses.gather(self.ranks)
        rate = self.seen / (time.perf_counter() - self.since)
        self.seen, self.since = 0, time.perf_counter()
        left = self.pace.left(self.trainer.step, self.config.steps, self.config.max_minutes)
        remaining = {} if left is None else {"left": tqdm.format_interval(left)}
        self.bar.set_postfix(
            loss=f"{self.losses.mean():.3f}", images_per_s=f"{rate:.0f}", **remaining
        )
        if self.journal is not None:
            lr = self.trainer.learning_rate()
            scalars = {**self.losses.scalars(), "images_per_s": rate, "lr": lr}
            self.journal.scalars(self.trainer.step, scalars)
        self.losses.reset()

    def _snapshot(self) -> None:
        self._save()
        if self.journal is not None:
            self.journal.sample(self.trainer)
        self.since, self.seen = time.perf_counter(), 0

    def _save(self) -> None:
        self.saved_at = self.trainer.step
        if self.journal is None:
            return
        self.journal.held_out(self.trainer, self.held_out)
        self.journal.save(self.trainer)

    def _finish(self, stopped: bool) -> None:
        """Saves the last step, and draws its grid unless the run was stopped."""
        journal = self.journal
        if journal is None or (
            self.saved_at == self.trainer.step and training_run.is_run(journal.run)
        ):
            return
        self._save()
        if not stopped:
            journal.sample(self.trainer)
