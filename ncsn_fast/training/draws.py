"""Random numbers of training: a pure function of (seed, step, place in the batch, element).

They follow the noise contract (ops/noise.py) on stream TRAINING, with
    sample = the image's place in the whole batch of a step
    step   = 4 * the optimiser's step + part
so a batch has the same levels and noise in one process and in many, whatever its micro-batches.
"""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops.noise import Stream

PARTS = 4
LARGEST_STEP = 2**32 // PARTS  # steps of the contract have 32 bits
_DECISIONS = 4  # uniforms of one image


class Part(enum.IntEnum):
    """Purposes of the numbers of a step."""

    NOISE = 0
    DECISIONS = 1  # level or time, flip, ...
    DEQUANTISATION = 2
    HELD_OUT = 3  # noise of the held-out images, always at step 0


class Decision(enum.IntEnum):
    """Uniforms of Part.DECISIONS, by index."""

    LEVEL = 0
    FLIP = 1
    LABEL = 2
    DROPOUT = 3  # of the micro-batch that begins here


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers of some images of a step.

    Attributes:
        seed: seed of the run, 32 bits.
        step: step of the optimiser, below LARGEST_STEP.
        places: (B,) int64, places of the images in the whole batch, on the device of the draws.
    """

    seed: int
    step: int
    places: Tensor

    def _step(self, part: Part) -> int:
        return PARTS * self.step + part

    def normal(self, shape: torch.Size, part: Part = Part.NOISE) -> Tensor:
        """Returns standard normals (B, *shape), float32."""
        return ops.normal(self.seed, self.places, Stream.TRAINING, self._step(part), shape)

    def uniform(self, shape: torch.Size, part: Part = Part.DEQUANTISATION) -> Tensor:
        """Returns uniforms in [0, 1), float32 (B, *shape)."""
        return ops.uniform(self.seed, self.places, Stream.TRAINING, self._step(part), shape)

    def decide(self, what: Decision) -> Tensor:
        """Returns one uniform in [0, 1) for each image, float32 (B,)."""
        return self.uniform(torch.Size([_DECISIONS]), Part.DECISIONS)[:, what]
