"""Sizes of micro-batches where none is named."""

from __future__ import annotations

import torch

LARGEST_BATCH_SIZE = 256  # default limit on images per micro-batch


def largest_batch_size(shape: tuple[int, int, int], device: torch.device) -> int:
    """Returns a power-of-two batch size for images (C, H, W) whose activations fit in memory."""
    pixels = 65_536 if device.type == "cpu" else 524_288
    most = max(1, min(LARGEST_BATCH_SIZE, pixels // (shape[1] * shape[2])))
    return 1 << (most.bit_length() - 1)


def balanced_batch_size(n: int, largest: int) -> int:
    """Returns the least size that cuts n images into as few batches as `largest` does.

    With 64 as the largest, 65 gives 33.
    """
    n_batches = max(1, -(-n // largest))
    return max(1, -(-n // n_batches))


def default_batch_size(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """Returns the smallest power of two that holds n images, up to `largest_batch_size`."""
    return min(largest_batch_size(shape, device), 1 << max(0, n - 1).bit_length())
