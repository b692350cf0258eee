"""Output of a training run: statistics, TensorBoard, sample grids, checkpoints."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.checkpoints import training_run
from ncsn_fast.data.files import atomic_write, remove_leftovers
from ncsn_fast.data.formats.base import MemoryImages
from ncsn_fast.data.images import save_grid
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.inference.runner import SamplingError
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.sampler import Sampler
from ncsn_fast.training.configs import TrainConfig
from ncsn_fast.training.ranks import Ranks
from ncsn_fast.training.trainer import Trainer

log = logging.getLogger(__name__)


class LevelLosses:
    """Mean losses since the last reset: of all levels, and of each band of levels."""

    N_BANDS = 8

    def __init__(self, n_sigmas: int, device: torch.device | str = "cpu") -> None:
        bands = torch.arange(n_sigmas) * min(self.N_BANDS, n_sigmas) // n_sigmas
        self.n_bands = int(bands[-1]) + 1
        self.bands = bands.to(device)
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, self.n_bands, device=self.bands.device)

    def add(self, level: Tensor, losses: Tensor) -> None:
        """Adds losses (B,) of images at levels (B,); waits for no device."""
        rows = torch.stack((losses.float(), torch.ones_like(losses, dtype=torch.float32)))
        self.sums.index_add_(1, self.bands[level], rows)

    def gather(self, ranks: Ranks) -> None:
        """Takes the sums of all ranks; all of them must call it."""
        self.sums = ranks.sum(self.sums.cpu()).to(self.sums.device)

    def mean(self) -> float:
        total, count = self.sums.sum(1).tolist()
        return total / count

    def scalars(self, name: str = "loss") -> dict[str, float]:
        """Returns TensorBoard scalars: the loss, and that of each band seen (0: largest sigmas)."""
        means = (self.sums[0] / self.sums[1]).tolist()
        bands = {
            f"{name}_by_level/band_{i}": value for i, value in enumerate(means) if value == value
        }
        return {name: self.mean(), **bands}


class Journal:
    """Output of a run: TensorBoard scalars and images, sample grids, the newest checkpoints.

    Args:
        step: current step of the run; TensorBoard entries of a killed process beyond it are
            dropped.
    """

    def __init__(self, run: Path, config: TrainConfig, step: int = 0) -> None:
        self.run, self.config = run, config
        remove_leftovers(run / training_run.CHECKPOINTS)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        except ImportError:
            log.warning(
                "no TensorBoard logs: the package is missing (pip install 'ncsn_fast[train]')"
            )
            self.board = None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint of this step, then drops the oldest beyond `keep`."""
        trainer.check_weights()
        folder = self.run / training_run.CHECKPOINTS
        # Through memory: torch.save reports no clear error on a full disk.
        contents = io.BytesIO()
        torch.save(trainer.state_dict(), contents)

        def write(path: Path) -> None:
            with atomic_write(path) as temporary:
                temporary.write_bytes(contents.getbuffer())

        write_or_keep(folder / f"step_{trainer.step:08d}.pt", write)
        for old in training_run.checkpoint_paths(self.run)[: -self.config.keep]:
            old.unlink()

    def held_out(self, trainer: Trainer, held_out: MemoryImages) -> None:
        """Writes the loss of the held-out images, and chooses the average where it is least."""
        if not len(held_out):
            return
        labels = held_out.labels if trainer.model.n_classes else None
        found = {}
        for name, (level, losses) in trainer.held_out_losses(held_out.images, labels).items():
            sums = LevelLosses(trainer.model.config.n_sigmas, trainer.device)
            sums.add(level, losses)
            found[name] = sums
        trainer.averages.choose({name: sums.mean() for name, sums in found.items()})
        best = found.get(trainer.averages.chosen) or found["raw"]
        scalars = best.scalars("held_out_loss")
        if len(found) > 1:
            scalars |= {f"held_out_loss/ema_{name}": sums.mean() for name, sums in found.items()}
        self.scalars(trainer.step, scalars)
        log.info(
            "step %d: held-out loss %s",
            trainer.step,
            ", ".join(f"{sums.mean():.4g} ({name})" for name, sums in found.items()),
        )

    def grid_path(self, step: int) -> Path:
        """File of the grid that is drawn at a step."""
        return self.run / "samples" / f"step_{step:08d}.png"

    def sample_again(self, trainer: Trainer) -> None:
        """Draws the grid of the checkpoint that was just loaded, if a kill prevented it."""
        remove_leftovers(self.run / "samples")
        last = trainer.step >= self.config.steps
        due = last or trainer.step % self.config.snapshot_every == 0
        if due and not self.grid_path(trainer.step).exists():
            self.sample(trainer)

    def sample(self, trainer: Trainer) -> None:
        """Draws a grid from the averaged weights into samples/ and TensorBoard."""
        if self.config.grid < 1:
            return
        model = trainer.averaged()
        sampler = Sampler(model, engine="eager", device=str(trainer.device))
        unet = isinstance(model.config, UNetConfig)  # its ladder has hundreds of levels
        how: dict[str, Any] = {"method": "heun", "steps": 18} if unet else {"method": "cas"}
        if n := model.n_classes:
            how["labels"] = torch.arange(self.config.grid) % n
        try:
            images = sampler.sample(self.config.grid, seed=self.config.seed, progress=False, **how)
        except SamplingError as error:  # a model that cannot sample yet may still learn to
            log.warning("no samples at step %d: %s", trainer.step, error)
            return
        grid = save_grid(images, self.grid_path(trainer.step))
        if self.board is not None:
            self.board.add_image("samples", grid, trainer.step, dataformats="HWC")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
