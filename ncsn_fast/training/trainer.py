"""State of a training run, and its step."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.data.loader import drop_labels
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.training.averages import Averages, finite
from ncsn_fast.training.configs import TrainConfig
from ncsn_fast.training.draws import Decision, Draws, Part
from ncsn_fast.training.objective import Objective, stratified
from ncsn_fast.training.ranks import Ranks, micro_batches, without_reduction

# Settings of an optimiser that are not its mathematics; a checkpoint may come from another device.
_IMPLEMENTATION = ("lr", "fused", "foreach", "capturable")


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch's generators start from a seed, and go on afterwards as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class TrainingError(RuntimeError):
    """Error of a training run that cannot continue; the message says why and what to do."""


class DivergedError(TrainingError):
    """Error of a loss or weights that are no longer finite."""


class PeerError(TrainingError):
    """Error of a run of several ranks, one of which has stopped."""


class Trainer:
    """State of a run (weights, moving averages, optimiser) and its step.

    A step depends on (seed, step, batch) alone: levels and noise are functions of the image's place
    in the batch (draws.py), whichever rank and micro-batch it falls to.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig | UNetConfig,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        torch.manual_seed(config.seed)  # initial weights
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        self.model = ScoreModel(model_config).train()
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, eps=config.adam_eps, fused=True
        )
        self.averages = Averages(self.model, config)
        self.objective = Objective(self.model, config.anneal_power)
        if config.compile:
            self.objective.compile()
        self._distributed = self.ranks.wrap(self.objective)
        self._finite: Tensor | None = None  # on a GPU: whether all losses since the last check are
        self.step = 0
        self.n_images = 0  # of the data set; determines the order of batches

    def learning_rate(self) -> float:
        """Returns Adam's rate at this step: linear warm-up, then constant or a cosine to 0."""
        c = self.config
        rate = c.lr * min(1.0, (self.step + 1) / max(c.warmup, 1))
        if c.decay:
            rate *= 0.5 * (1 + math.cos(math.pi * min(self.step / c.steps, 1.0)))
        return rate

    def draws(self, places: slice) -> Draws:
        """Returns the random numbers of this step for some places of its batch."""
        where = torch.arange(places.start, places.stop, device=self.device)
        return Draws(self.config.seed, self.step, where)

    def prepare(self, images: Tensor, draws: Draws) -> Tensor:
        """Converts uint8 (B, C, H, W) to augmented float32 images in [0, 1] on the device."""
        x = images.to(self.device, non_blocking=True).to(torch.float32) / 255
        if self.config.flip:
            flipped = draws.decide(Decision.FLIP) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        if self.config.dequantise:
            x = x * (255 / 256) + draws.uniform(x.shape[1:], Part.DEQUANTISATION) / 256
        return x.contiguous(memory_format=torch.channels_last)

    def train_step(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Takes one optimiser step on a batch, of which this rank computes its share.

        Args:
            images: uint8 (B, C, H, W), the whole batch, or this rank's share of it.
            labels: (B,) int64, for a network with classes.

        Returns:
            the levels and losses of the share, on the device.

        Raises:
            DivergedError: a loss is not finite. On a GPU, `check_losses` looks later.
            PeerError: another rank has stopped; the state is that before this step.
        """
        return self.step_on(images, self.ranks.share(len(images)), len(images), labels)

    def step_on(
        self, images: Tensor, share: slice, batch: int, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Takes one step on a batch of `batch` images, this rank's being those of `share`.

        Args:
            images: the whole batch, or the share's images.
            labels: theirs, for a network with classes.
        """
        if labels is None and self.model.n_classes:
            raise ValueError(
                f"this network has {self.model.n_classes} classes: give labels ({len(images)},)"
            )
        self.model.train()  # a snapshot that samples from it left it in evaluation mode
        whole = len(images) == batch
        mine = images[share] if whole else images
        classes = labels if labels is None or not whole else labels[share]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(micro_batches(len(mine), self.config.accumulate))
        found = []
        for part in parts:
            draws = self.draws(slice(share.start + part.start, share.start + part.stop))
            last = part is parts[-1]
            with (
                without_reduction(self._distributed, last),
                self._dropout(share.start + part.start),
            ):
                own = None if classes is None else classes[part]
                level, losses = self._losses(mine[part], draws, own)
                self._note_finite(losses, level)
                # The reduction averages over ranks; their shares may differ in size.
                self._backward(losses.sum() * (self.ranks.count / batch))
            found.append((level, losses.detach()))
        if self.config.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.averages.update(self.model, self.step)
        self.step += 1
        levels, values = zip(*found, strict=True)
        return torch.cat(levels), torch.cat(values)

    def _losses(self, images: Tensor, draws: Draws, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.prepare(images, draws)
        kept = () if labels is None else (self._drop(labels, draws),)
        with self._autocast():
            level, losses = self._distributed(
                x, draws.decide(Decision.LEVEL), draws.normal(x.shape[1:]), *kept
            )
        return level, losses

    def _drop(self, labels: Tensor, draws: Draws) -> Tensor:
        """Returns labels (B,) on the device, some replaced by that of no class."""
        labels = labels.to(self.device, non_blocking=True)
        uniform, probability = draws.decide(Decision.LABEL), self.config.label_dropout
        return drop_labels(labels, self.model.n_classes, uniform, probability)

    def _dropout(self, place: int) -> contextlib.AbstractContextManager[None]:
        """Context in which dropout depends on the step and the images' places alone.

        Torch's generator draws its masks, one micro-batch at a time: they are the same when a run
        is resumed, but not when it is shared otherwise.
        """
        uniform = Draws(self.config.seed, self.step, torch.tensor([place])).decide(Decision.DROPOUT)
        return _seeded(int(float(uniform) * 2**24), self.device)  # of 24 bits, as uniforms have

    def _autocast(self) -> torch.autocast:
        on = self.config.autocast != "none"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def _backward(self, loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            if self.ranks.count == 1:
                raise
            raise PeerError(
                f"another rank has stopped at step {self.step}, or cannot be reached any more; see "
                "what it says"
            ) from error

    @torch.no_grad()
    def held_out_losses(
        self, images: Tensor, labels: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Computes the losses of held-out images, at fixed levels and noise.

        Args:
            images: uint8 (N, C, H, W).
            labels: (N,) int64, for a network with classes; none is left out.

        Returns:
            levels and losses (N,), by name of the average; "raw" for the weights themselves where
            there are no averages.
        """
        models = self.averages.models() or {"raw": self.model}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
        size = max(self.config.batch_size // self.ranks.count, 1)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            where = torch.arange(start, start + len(part), device=self.device)
            draws = Draws(self.config.seed, 0, where)
            x = part.to(self.device, torch.float32) / 255
            x = x.contiguous(memory_format=torch.channels_last)
            noise = draws.normal(x.shape[1:], Part.HELD_OUT)
            own = None if labels is None else labels[start : start + size].to(self.device)
            for name, model in models.items():
                objective = Objective(model.eval(), self.config.anneal_power)
                found[name].append(objective(x, stratified(where), noise, own))
        return {
            name: (torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows]))
            for name, rows in found.items()
        }

    def _note_finite(self, losses: Tensor, level: Tensor) -> None:
        if self.device.type != "cpu":  # looking would wait for the device
            fine = torch.isfinite(losses).all()
            self._finite = fine if self._finite is None else self._finite & fine
            return
        bad = ~torch.isfinite(losses)
        if bool(bad.any()):
            at = int(level[bad][0])
            raise DivergedError(
                f"the loss is {float(losses.detach()[bad][0])} at step {self.step}, level {at} "
                f"(sigma {float(self.model.sigmas[at]):.4g})"
            )

    def check_losses(self) -> None:
        """Raises DivergedError if a loss since the last call was not finite."""
        fine, self._finite = self._finite, None
        if fine is not None and not bool(fine):
            raise DivergedError(f"the loss is no longer finite, shortly before step {self.step}")

    def check_weights(self) -> None:
        """Raises DivergedError if a weight is no longer finite."""
        if name := finite(self.model):
            raise DivergedError(f"weight {name} is no longer finite after step {self.step}")

    def averaged(self) -> ScoreModel:
        """Returns the model to sample from: the chosen moving average if there is one."""
        return self.averages.models().get(self.averages.chosen, self.model)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that an exact resumption needs; the data order follows from seed and step."""
        averages = {
            "ema_name": self.averages.chosen,
            "averages": self.averages.state_dict(),
        }
        return {
            "step": self.step,
            "n_images": self.n_images,
            "model": self.model.state_dict(),
            "ema": self.averaged().state_dict() if self.averages else None,
            **(averages if len(self.averages.decays) > 1 else {}),
            "optimizer": self.optimizer.state_dict(),
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
            if self.averages:
                name = state.get("ema_name", self.averages.chosen)
                self.averages.load_state_dict(name, state["ema"], state.get("averages", {}))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"the checkpoint does not fit this run: {reason}") from error
        self.step = state["step"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Adam's moments; ValueError unless they are those of these weights and settings."""
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state)
        for group, found in zip(own, self.optimizer.state_dict()["param_groups"], strict=True):
            settings = [k for k in group if k not in _IMPLEMENTATION]
            changed = [k for k in settings if found.get(k) != group[k]]
            if changed:
                raise ValueError(f"the optimizer has another {', '.join(changed)}")
        for group, ours in zip(self.optimizer.param_groups, own, strict=True):
            group.update({k: ours[k] for k in _IMPLEMENTATION if k in ours})
        for weight, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = moments[name]
                if moment.shape != weight.shape or not bool(torch.isfinite(moment).all()):
                    raise ValueError(f"{name} of shape {tuple(moment.shape)} does not fit a weight")
            step = float(moments["step"])
            if not 0 <= step < math.inf or bool((moments["exp_avg_sq"] < 0).any()):
                raise ValueError("the optimizer's steps and mean squares must not be negative")
            moments["step"] = torch.as_tensor(step, device=weight.device)
