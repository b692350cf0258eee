"""Trains a classifier of digits that ships, `ncsn_fast/assets/NAME_features`.

    python tools/train_features.py digits
    python tools/train_features.py mnist --data MNIST

One thread, so that a rerun on the same machine and torch gives the same bits: ten seconds for the
digits, minutes for MNIST (a folder of its four IDX files). Cross entropy on the training images,
shifted; the accuracy on the held-out ones is written into the file.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from ship_model import RECORD, digests
from torch import Tensor

from ncsn_fast.data import datasets
from ncsn_fast.data.files import atomic_write
from ncsn_fast.evaluation.features import CLASSIFIERS, DigitNet

SEED = 0


class Recipe(NamedTuple):
    """Settings of a training: AdamW with a cosine decay of its rate to zero.

    `shift` is the largest shift of a batch, in pixels; `layout` is of the weights while they are
    trained; `dtype` that of the file.
    """

    steps: int
    batch_size: int
    lr: float
    shift: int
    dtype: torch.dtype
    layout: torch.memory_format


RECIPES = {
    "digits": Recipe(1500, 64, 3e-3, 1, torch.float32, torch.contiguous_format),
    "mnist": Recipe(3750, 128, 3e-3, 1, torch.float16, torch.channels_last),
}


def read(name: str, data: str | None, split: str) -> tuple[Tensor, Tensor]:
    """Returns images (N, 1, S, S) in [0, 1] and labels (N,); split is "train" or "held-out"."""
    size = CLASSIFIERS[name].size
    if name == "digits":
        images, labels = datasets.digits("train" if split == "train" else "held-out", size)
        return images.float() / 255, labels
    source = f"{data}:{'train' if split == 'train' else 'test'}"
    opened = datasets.open_images(source, size=size, channels=1)
    if opened.labels is None:
        raise SystemExit(f"{source} has no labels: give a folder of MNIST's four IDX files")
    return datasets.stack(opened).float() / 255, opened.labels


def train(net: DigitNet, images: Tensor, labels: Tensor, recipe: Recipe) -> DigitNet:
    """Trains a classifier, and scales its features."""
    size, shifts = images.shape[-1], 2 * recipe.shift + 1
    padded = F.pad(images, (recipe.shift,) * 4)
    # PyTorch's stubs want a device beside it.
    net.to(memory_format=recipe.layout)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=1e-2)
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.5 * recipe.lr * (1 + math.cos(math.pi * step / recipe.steps))
        rows = torch.randint(len(labels), (recipe.batch_size,))
        top, left = torch.randint(shifts, (2,)).tolist()
        _, logits = net(padded[rows, :, top : top + size, left : left + size])
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return scaled(net.eval(), images)


@torch.no_grad()
def outputs(net: DigitNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the features and logits of images (N, 1, S, S) in [0, 1]."""
    features, logits = zip(*(net(part) for part in images.split(1000)), strict=True)
    return torch.cat(features), torch.cat(logits)


@torch.no_grad()
def scaled(net: DigitNet, images: Tensor) -> DigitNet:
    """Returns the same classifier with features scaled to mean square 1 on these images."""
    scale = outputs(net, images)[0].square().mean().sqrt()
    net.features.weight /= scale
    net.features.bias /= scale
    net.classes.weight *= scale
    return net


def described(recipe: Recipe, n: int) -> str:
    """Returns a recipe in words, for the card (tools/write_cards.py)."""
    return (
        f"Cross entropy on {n} training images, shifted by up to {recipe.shift} "
        f"pixel{'s' * (recipe.shift > 1)}; "
        f"{recipe.steps} steps of AdamW in batches of {recipe.batch_size}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", help="folder of MNIST's four IDX files")
    options = parser.parse_args()
    name, recipe, file = options.name, RECIPES[options.name], CLASSIFIERS[options.name].file
    if name != "digits" and options.data is None:
        parser.error(f"{name} needs --data: a folder of its IDX files")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    learnt = read(name, options.data, "train")
    net = train(CLASSIFIERS[name].network(), *learnt, recipe)
    state = {key: value.to(recipe.dtype).contiguous() for key, value in net.state_dict().items()}
    net.load_state_dict(state)  # as it is stored
    images, labels = read(name, options.data, "held-out")
    right = float((outputs(net, images)[1].argmax(1) == labels).double().mean())
    metadata = {"held_out_accuracy": f"{right:.4f}"}  # one entry: more have no fixed order
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file) as path:
        path.write_bytes(safetensors.torch.save(state, metadata=metadata))
    print(f"{file}: {file.stat().st_size} bytes, {metadata}")
    if options.data is not None:
        record = {"recipe": described(recipe, len(learnt[1])), "data": digests(options.data)}
        (file.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
