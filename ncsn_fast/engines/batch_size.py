"""How many images a micro-batch has where nobody says."""

from __future__ import annotations

import torch

MOST = 256


def largest_batch_size(shape: tuple[int, int, int], device: torch.device) -> int:
    """The power of two of images (C, H, W) for which memory for activations is there for sure."""
    pixels = 65_536 if device.type == "cpu" else 524_288
    most = max(1, min(MOST, pixels // (shape[1] * shape[2])))
    return 1 << (most.bit_length() - 1)


def default_batch_size(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """The smallest power of two that holds n images, as far as memory allows."""
    return min(largest_batch_size(shape, device), 1 << max(0, n - 1).bit_length())
