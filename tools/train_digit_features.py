"""Trains the feature extractor of the digits, `ncsn_fast/assets/digit_features/model.safetensors`.

`python tools/train_digit_features.py` (about ten seconds; one thread, so that a rerun on the same
machine and torch gives the same bits). Cross entropy on the training digits, shifted by up to one
pixel; its accuracy on the held-out digits is written into the file.
"""

from __future__ import annotations

import math

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.data import datasets
from ncsn_fast.data.files import atomic_write
from ncsn_fast.evaluation.features import DIGIT_FEATURES, DigitNet

STEPS, BATCH_SIZE, LR, SEED = 1500, 64, 3e-3, 0


def train() -> DigitNet:
    """Trains the extractor for STEPS of AdamW with a cosine learning rate decay to zero."""
    torch.manual_seed(SEED)
    images, labels = datasets.digits("train", 16)
    padded = F.pad(images.float() / 255, (1, 1, 1, 1))
    net = DigitNet()
    optimiser = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=1e-2)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 0.5 * LR * (1 + math.cos(math.pi * step / STEPS))
        rows = torch.randint(len(labels), (BATCH_SIZE,))
        top, left = torch.randint(3, (2,)).tolist()
        _, logits = net(padded[rows, :, top : top + 16, left : left + 16])
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return scaled(net.eval(), images.float() / 255)


@torch.no_grad()
def scaled(net: DigitNet, images: Tensor) -> DigitNet:
    """Returns the same classifier with features scaled to mean square 1 on these images."""
    scale = net(images)[0].square().mean().sqrt()
    net.features.weight /= scale
    net.features.bias /= scale
    net.classes.weight *= scale
    return net


def accuracy(net: DigitNet) -> float:
    """Returns the accuracy on the held-out digits."""
    images, labels = datasets.digits("held-out", 16)
    with torch.no_grad():
        return float((net(images.float() / 255)[1].argmax(1) == labels).double().mean())


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    net = train()
    metadata = {"held_out_accuracy": f"{accuracy(net):.4f}"}  # one entry: more have no fixed order
    with atomic_write(DIGIT_FEATURES) as path:
        path.write_bytes(safetensors.torch.save(net.state_dict(), metadata=metadata))
    print(f"{DIGIT_FEATURES}: {DIGIT_FEATURES.stat().st_size} bytes, {metadata}")


if __name__ == "__main__":
    main()
