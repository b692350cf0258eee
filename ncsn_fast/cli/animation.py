"""Animations of chains on their way from noise to images: the callback that records, the GIF."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncsn_fast.data.files import atomic_write
from ncsn_fast.data.images import UInt8, make_grid, to_uint8
from ncsn_fast.data.rescue import write_or_keep
from ncsn_fast.inference.monitor import Progress

FRAMES = 60  # besides the last one, which shows the result
_MILLISECONDS, _HOLD = 50, 2000  # of a frame, and of the last one


class Panel:
    """States of the chains of one call, in FRAMES frames.

    A frame stands for a share of the way from the largest to the smallest noise level, in log
    sigma, so that methods of any steps show the same way. It has a chain's last state there.

    Args:
        last: smallest noise level of the model.
    """

    def __init__(self, last: float) -> None:
        self.last = last
        self._first: dict[int, float] = {}  # largest sigma of a chain
        self._frames: dict[int, dict[int, UInt8]] = {}  # by chain, then frame

    def __call__(self, progress: Progress) -> None:
        """Records the state of a micro-batch."""
        shown = to_uint8(progress.x)
        for index, state in zip(progress.samples.tolist(), shown, strict=True):
            first = self._first.setdefault(index, progress.sigma)
            self._frames.setdefault(index, {})[self._frame(first, progress.sigma)] = state

    def _frame(self, first: float, sigma: float) -> int:
        way = math.log(first / self.last) if first > self.last else 0.0
        share = math.log(first / max(sigma, self.last)) / way if way else 1.0
        return round(min(max(share, 0.0), 1.0) * (FRAMES - 1))

    def frames(self) -> Tensor:
        """Returns the states (FRAMES, chains, C, H, W) uint8, chains in the order of their index.

        A frame in which a chain took no step shows its state before, or at first its first one.
        """
        rows = []
        for _, seen in sorted(self._frames.items()):
            shown = [seen[min(seen)]]
            for frame in range(FRAMES):
                shown.append(seen.get(frame, shown[-1]))
            rows.append(np.stack(shown[1:]))
        return torch.from_numpy(np.stack(rows, axis=1)).permute(0, 1, 4, 2, 3)


class Animation:
    """Recorder of the calls of a command, one panel each."""

    def __init__(self, last: float) -> None:
        self.last = last
        self.panels: list[Panel] = []

    def of(self, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call of Sampler that records it in a panel of its own."""
        self.panels.append(Panel(self.last))
        return {**call, "callback": self.panels[-1]}

    def write(self, path: Path, results: Tensor, columns: int | None = None) -> None:
        """Writes a GIF of all panels in a grid, which ends with the results.

        Args:
            results: images (N, C, H, W) in [0, 1], those of the panels in their order.
            columns: images per row; None for a square.
        """
        states = torch.cat([panel.frames() for panel in self.panels], dim=1).float() / 255
        sheets = [make_grid(frame, columns) for frame in (*states, results)]
        pictures = [Image.fromarray(sheet).quantize(256) for sheet in sheets]

        def save(place: Path) -> None:
            with atomic_write(place) as temporary:
                pictures[0].save(
                    temporary, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
                    duration=[*[_MILLISECONDS] * FRAMES, _HOLD],
                )  # fmt: skip

        write_or_keep(path, save)
