"""Models of engines that hold their weights in another form."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ncsn_fast.models.score import ScoreModel


def without_weights(model: ScoreModel, keep: Collection[str] = ()) -> ScoreModel:
    """Copies the model with storage-free parameters: all shapes, one number of memory each.

    keep: names of parameters of the network that are copied as they are.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
        for name, p in model.named_parameters()
        if name.removeprefix("net.") not in keep
    }
    return copy.deepcopy(model, memo).cpu().eval()
