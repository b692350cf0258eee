"""Parts of a training run: its state and step, its statistics, and its output."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ncsn_fast.checkpoints import training_run
from ncsn_fast.data.files import atomic_write, remove_leftovers
from ncsn_fast.data.images import save_grid
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.diffusion.objectives import (
    continuous_score_matching,
    denoising_score_matching,
    random_levels,
    random_times,
)
from ncsn_fast.inference.runner import SamplingError
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.sampler import Sampler
from ncsn_fast.training.configs import TrainConfig

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Error of a training run that cannot continue; the message says why and what to do."""


class DivergedError(TrainingError):
    """Error of a loss or weights that are no longer finite."""


class Trainer:
    """State of a run (weights, moving average, optimiser, random numbers) and its step."""

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig | UNetConfig, device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)  # initial weights
        self.config, self.device = config, device
        self.model = ScoreModel(model_config).train()
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, eps=config.adam_eps
        )
        self.ema: AveragedModel | None = None
        if config.ema > 0:
            self.ema = AveragedModel(self.model, multi_avg_fn=self._average)
            self.ema.update_parameters(self.model)  # the average starts at the initial weights
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.n_images = 0  # of the data set; determines the order of batches

    def ema_decay(self) -> float:
        """Returns the decay m of the average at this step: theta' = m theta' + (1 - m) theta."""
        n = self.step + 1
        return (
            min(self.config.ema, (1 + n) / (10 + n)) if self.config.ema_warmup else self.config.ema
        )

    def _average(self, averaged: Any, current: Any, n_averaged: Any) -> None:
        get_ema_multi_avg_fn(self.ema_decay())(averaged, current, n_averaged)

    def learning_rate(self) -> float:
        """Returns Adam's rate at this step: linear warm-up, then constant or a cosine to 0."""
        c = self.config
        rate = c.lr * min(1.0, (self.step + 1) / max(c.warmup, 1))
        if c.decay:
            rate *= 0.5 * (1 + math.cos(math.pi * min(self.step / c.steps, 1.0)))
        return rate

    def prepare(self, images: Tensor) -> Tensor:
        """Converts uint8 (B, C, H, W) to augmented float32 images in [0, 1] on the device."""
        x = images.to(torch.float32) / 255
        if self.config.flip:
            flipped = torch.rand(len(x), generator=self.generator) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        if self.config.dequantise:
            x = x * (255 / 256) + torch.rand(x.shape, generator=self.generator) / 256
        return x.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def train_step(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Takes one optimiser step; returns the levels and losses (B,) of its images."""
        self.model.train()  # a snapshot that samples from it left it in evaluation mode
        x = self.prepare(images)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.autocast):
            level, losses = self._losses(x)
        self._check_finite(losses, level)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        if self.config.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        return level.cpu(), losses.detach().cpu()

    def _losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns losses (B,) and their levels (B,), the nearest ones for continuous times."""
        model, clock = self.model, self.model.clock
        if clock is not None:
            t = random_times(len(x), clock.t_min, self.generator).to(self.device)
            noise = torch.randn(x.shape, generator=self.generator).to(self.device)
            std = clock.std(t).float()
            losses = continuous_score_matching(model.score_at_time, x, t, std, noise)
            return model.nearest_level(std), losses
        level = random_levels(len(x), model.config.n_sigmas, self.generator).to(self.device)
        noise = torch.randn(x.shape, generator=self.generator).to(self.device)
        losses = denoising_score_matching(
            model.score_at, x, model.sigmas, level, noise, anneal_power=self.config.anneal_power
        )
        return level, losses

    def _check_finite(self, losses: Tensor, level: Tensor) -> None:
        bad = ~torch.isfinite(losses)
        if not bool(bad.any()):
            return
        at = int(level[bad][0])
        raise DivergedError(
            f"the loss is {float(losses.detach()[bad][0])} at step {self.step}, level {at} "
            f"(sigma {float(self.model.sigmas[at]):.4g})"
        )

    def check_weights(self) -> None:
        """Raises DivergedError if a weight is no longer finite."""
        for name, weight in self.model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise DivergedError(f"weight {name} is no longer finite after step {self.step}")

    def averaged(self) -> ScoreModel:
        """Returns the model to sample from: the moving average if there is one."""
        module = self.model if self.ema is None else self.ema.module
        assert isinstance(module, ScoreModel)
        return module

    def state_dict(self) -> dict[str, Any]:
        """Returns all that an exact resumption needs; the data order follows from seed and step."""
        return {
            "step": self.step,
            "n_images": self.n_images,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.averaged().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "model_config": json.dumps(self.model.config.to_dict()),
            "train_config": self.config.to_json(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of state_dict().

        Raises:
            TrainingError: it belongs to another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            self._load_optimizer(state["optimizer"])
            if self.ema is not None:
                self.averaged().load_state_dict(state["ema"])
            self.generator.set_state(state["generator"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"the checkpoint does not fit this run: {reason}") from error
        self.step = state["step"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Adam's moments; ValueError unless they are those of these weights and settings."""
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state)
        for group, found in zip(own, self.optimizer.state_dict()["param_groups"], strict=True):
            changed = [k for k in group if k != "lr" and found.get(k) != group[k]]
            if changed:
                raise ValueError(f"the optimizer has another {', '.join(changed)}")
        for weight, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = moments[name]
                if moment.shape != weight.shape or not bool(torch.isfinite(moment).all()):
                    raise ValueError(f"{name} of shape {tuple(moment.shape)} does not fit a weight")
            step = float(moments["step"])
            if not 0 <= step < math.inf or bool((moments["exp_avg_sq"] < 0).any()):
                raise ValueError("the optimizer's steps and mean squares must not be negative")
            moments["step"] = torch.as_tensor(step)


class LevelLosses:
    """Mean losses since the last reset: of all levels, and of each band of levels."""

    N_BANDS = 8

    def __init__(self, n_sigmas: int) -> None:
        self.bands = torch.arange(n_sigmas) * min(self.N_BANDS, n_sigmas) // n_sigmas
        self.n_bands = int(self.bands[-1]) + 1
        self.reset()

    def reset(self) -> None:
        self.total, self.count = torch.zeros(self.n_bands), torch.zeros(self.n_bands)

    def add(self, level: Tensor, losses: Tensor) -> None:
        """Adds losses (B,) of images at levels (B,)."""
        band = self.bands[level]
        self.total.index_add_(0, band, losses.float())
        self.count.index_add_(0, band, torch.ones(len(band)))

    def mean(self) -> float:
        return float(self.total.sum() / self.count.sum())

    def scalars(self) -> dict[str, float]:
        """Returns TensorBoard scalars: the loss, and that of each band seen (0: largest sigmas)."""
        means = (self.total / self.count).tolist()
        bands = {
            f"loss_by_level/band_{i}": value for i, value in enumerate(means) if value == value
        }
        return {"loss": self.mean(), **bands}


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
        sampler = Sampler(trainer.averaged(), engine="eager", device=str(trainer.device))
        try:
            images = sampler.sample(
                self.config.grid, method="cas", seed=self.config.seed, progress=False
            )
        except SamplingError as error:  # a model that cannot sample yet may still learn to
            log.warning("no samples at step %d: %s", trainer.step, error)
            return
        grid = save_grid(images, self.grid_path(trainer.step))
        if self.board is not None:
            self.board.add_image("samples", grid, trainer.step, dataformats="HWC")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
