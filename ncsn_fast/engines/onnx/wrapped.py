"""ONNX graphs of networks that users bring, with their parameterisation inside."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ncsn_fast.engines.lowering.export import PROBE, Exported
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.aten import translate
from ncsn_fast.engines.onnx.writer import Value, Writer
from ncsn_fast.models.score import ScoreModel


class ScaledScore(nn.Module):
    """sigma * score as a network of x (N, C, H, W), sigma (N,) and, with classes, labels (N,).

    All of it is computed in float32.
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.net, self.known = model.net, model.parameterisation
        self.n_classes = model.n_classes

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        form = self.known.linear_form(sigma, x.dtype)
        skip, out, const, scale, shift = (c.view(-1, 1, 1, 1) for c in form)
        condition = self.known.condition(sigma, x.dtype)
        more = () if labels is None else (labels,)
        f = self.net(scale * x + shift, condition, *more)
        return skip * x + out * f + const


def write(model: ScoreModel, dtype: torch.dtype, batch: int | None) -> Writer:
    """Writes the graph of sigma * score: "x" float32, "sigma" float32, maybe "labels" int64 -> "f".

    Raises:
        UnsupportedNetwork: torch cannot export the network, or an operation has no translation.
    """
    scored = ScaledScore(copy.deepcopy(model).cpu()).eval()
    n = batch or PROBE
    inputs = [torch.zeros(n, *model.image_shape), torch.ones(n)]
    names = {"x": torch.float32, "sigma": torch.float32}
    if model.n_classes:
        inputs.append(torch.zeros(n, dtype=torch.int64))
        names["labels"] = torch.int64
    exported = Exported(scored, inputs)
    if exported.batch is not None and batch is None:
        raise UnsupportedNetwork(
            "a forward that fixes the number of images, as len(x) does where x.shape[0] would not"
        )
    w = Writer(scored, dtype)
    f = translate(exported, w, [Value(name, kind) for name, kind in names.items()])
    w.op("Cast", f, name="f", to=torch.float32)
    return w
