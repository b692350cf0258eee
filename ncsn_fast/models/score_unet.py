"""U-Net of score_sde and EDM: NCSN++, DDPM++, DDPM, SongUNet and DhariwalUNet, from their tables.

Song et al. 2021, "Score-based generative modeling through stochastic differential equations"; Ho et
al. 2020, "Denoising diffusion probabilistic models"; Karras et al. 2022, "Elucidating the design
space of diffusion-based generative models"; Dhariwal and Nichol 2021, "Diffusion models beat GANs
on image synthesis".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn_fast.models.layers import check_images
from ncsn_fast.models.normalisation import normalise
from ncsn_fast.models.unet_architectures import UNetSettings
from ncsn_fast.models.unet_blocks import (
    NIN,
    Attention,
    Block,
    FilteredConv,
    Fourier,
    Positional,
    Resample,
    StridedConv,
    group_norm,
)
from ncsn_fast.models.unet_table import Row, table

_ALMOST_NOTHING = 1e-5


class ScoreUNet(nn.Module):
    """Network F(x, c, labels) of a UNetSettings; keys of its state dict are the published ones.

    Images are x (N, C, H, W), in [-1, 1] but for noise; in [0, 1] for the networks of score_sde
    that are not `centered`. c (N,) is what the network was trained to see of the noise level: sigma
    or the time, for example (models/unet_models.py). F is the output of the last convolution:
    score_sde's `scale_by_sigma` is left to the parameterisation.
    """

    def __init__(self, config: UNetSettings) -> None:
        super().__init__()
        self.config, self.shape, self.style = config, config.shape, config.style
        self.rows = table(self.shape)
        self.embedding_paths, *self.paths = config.paths()
        self.channels, self.n_classes = self.shape.channels, config.embedding.labels
        self.scale_input = not getattr(config, "centered", True)
        self._add_embedding()
        for row, paths in zip(self.rows, self.paths, strict=True):
            for path, module in self._modules_of(row, paths).items():
                self._add(path, module)
        self.reset_parameters()

    def _add(self, path: str, module: nn.Module) -> None:
        """Adds a module under a path, and the containers that lie between."""
        *above, name = path.split(".")
        parent: nn.Module = self
        for part in above:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, module)

    def _add_embedding(self) -> None:
        e, paths = self.config.embedding, self.embedding_paths
        features: nn.Module = Positional(e.features, endpoint=e.endpoint, cos_first=e.cos_first)
        if e.kind == "fourier":
            features = Fourier(e.features, e.scale, buffer=not e.log)
        self._add(paths["features"], features)
        if e.labels and not e.labels_last:
            self._add(paths["labels"], nn.Linear(e.labels, e.features))
        if e.augment:
            self._add(paths["augment"], nn.Linear(e.augment, e.features, bias=False))
        self._add(paths["layer0"], nn.Linear(e.features, e.width))
        self._add(paths["layer1"], nn.Linear(e.width, e.width))
        if e.labels and e.labels_last:
            self._add(paths["labels"], nn.Linear(e.labels, e.width, bias=False))

    def _modules_of(self, row: Row, paths: Mapping[str, str]) -> dict[str, nn.Module]:
        """Returns the modules of a row, by their paths."""
        style = self.style
        cin, cout = row.cin, row.cout
        if row.kind == "block":
            # EDM's blocks hold their attention.
            own = 0 if "attention" in paths else row.heads
            block = Block(
                cin + row.skip, cout, self.config.embedding.width, style,
                direction=row.resample, heads=own,
            )  # fmt: skip
            more = {paths["attention"]: Attention(cout, style)} if "attention" in paths else {}
            return {paths["block"]: block, **more}
        if row.kind == "resample":
            return {paths["conv"]: StridedConv(cout, row.resample)}
        if row.pyramid == "residual":
            return {paths["conv"]: FilteredConv(cin, cout, style)}
        if row.pyramid == "skip":
            return {paths["down"]: Resample("down", style), paths["conv"]: nn.Conv2d(cin, cout, 1)}
        if row.kind == "conv":
            return {paths["conv"]: nn.Conv2d(cin, cout, 3, padding=1)}
        up = {paths["up"]: Resample("up", style)} if row.resample else {}
        norm, conv = group_norm(cin, style), nn.Conv2d(cin, cout, 3, padding=1)
        return {**up, paths["norm"]: norm, paths["conv"]: conv}

    def reset_parameters(self) -> None:
        """Draws weights as published: Glorot's uniform ones, and zero biases.

        The last layers of residual branches, attention and outputs begin as almost nothing.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, NIN):
                nn.init.xavier_uniform_(module.W)
        with torch.no_grad():
            for weight in self._last_weights():
                weight.mul_(_ALMOST_NOTHING)

    def _last_weights(self) -> Iterator[Tensor]:
        for module in self.modules():
            if isinstance(module, (Block, Attention)):
                yield from module.last_weights()
        for row, paths in zip(self.rows, self.paths, strict=True):
            if row.kind == "output":
                yield self.get_parameter(f"{paths['conv']}.weight")

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x is (N, channels, H, W) with an admissible H and W."""
        check_images(x, self.channels, self.shape.size_multiple)

    def embed(
        self, c: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Computes the embedding (N, E) that all blocks take; see `forward`."""
        e, paths = self.config.embedding, self.embedding_paths
        layer0, layer1 = self.get_submodule(paths["layer0"]), self.get_submodule(paths["layer1"])
        h = self.get_submodule(paths["features"])(c.log() if e.log else c)
        h = h.to(layer0.weight.dtype)
        classes = self._classes(labels, h) if e.labels else None
        if classes is not None and not e.labels_last:
            h = h + self.get_submodule(paths["labels"])(classes * math.sqrt(e.labels))
        if augment_labels is not None and e.augment:
            h = h + self.get_submodule(paths["augment"])(augment_labels.to(h.dtype))
        h = layer1(F.silu(layer0(h)))
        if classes is not None and e.labels_last:
            h = h + self.get_submodule(paths["labels"])(classes)
        return F.silu(h)

    def _classes(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """Returns one-hot rows (N, n_classes); zeros mean no class."""
        n, dropout = self.n_classes, self.config.embedding.label_dropout
        if labels is None:
            return like.new_zeros(like.shape[0], n)
        if labels.is_floating_point():
            classes = labels.to(like.dtype)
        else:
            known = torch.arange(n, device=labels.device)
            classes = (labels[:, None] == known).to(like.dtype)
        if self.training and dropout:
            kept = torch.rand(like.shape[0], 1, device=like.device) >= dropout
            classes = classes * kept.to(like.dtype)
        return classes

    def forward(
        self,
        x: Tensor,
        c: Tensor | None = None,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Computes F(x, c, labels), shape of x.

        Args:
            c: (N,), what the network sees of the noise level.
            labels: classes (N,) int64, where n_classes means none, or one-hot rows (N, n_classes).
                None: no class.
            augment_labels: (N, augment_dim), what an augmentation did to the images of training.
        """
        self.check_input(x)
        if c is None:
            raise ValueError(
                "this network is conditioned on the noise level: pass c (N,), or use "
                "ScoreModel.score(x, sigma)"
            )
        if c.shape != x.shape[:1]:
            raise ValueError(f"c must be ({len(x)},); got {tuple(c.shape)}")
        embedding = self.embed(c, labels, augment_labels)
        h = pyramid = 2 * x - 1 if self.scale_input else x
        kept: list[Tensor] = []
        output: Tensor | None = None
        for row, paths in zip(self.rows, self.paths, strict=True):
            if row.kind == "block":
                h = self._block(row, paths, h, kept, embedding)
            elif row.kind == "pyramid":
                h, pyramid = self._pyramid(row, paths, h, pyramid)
            elif row.kind == "output":
                output = self._output(paths, h, output)
            else:
                h = self.get_submodule(paths["conv"])(h)
            if row.kept:
                kept.append(h)
        assert output is not None
        # Networks that predict a variance too have twice the channels.
        return output[:, : self.channels]

    def _block(
        self,
        row: Row,
        paths: Mapping[str, str],
        h: Tensor,
        kept: list[Tensor],
        embedding: Tensor,
    ) -> Tensor:
        if row.skip:
            h = torch.cat((h, kept.pop()), dim=1)
        h = self.get_submodule(paths["block"])(h, embedding)
        return self.get_submodule(paths["attention"])(h) if "attention" in paths else h

    def _pyramid(
        self, row: Row, paths: Mapping[str, str], h: Tensor, pyramid: Tensor
    ) -> tuple[Tensor, Tensor]:
        conv = self.get_submodule(paths["conv"])
        if row.pyramid == "residual":
            h = (h + conv(pyramid)) * self.style.scale
            return h, h
        pyramid = self.get_submodule(paths["down"])(pyramid)
        return h + conv(pyramid), pyramid

    def _output(self, paths: Mapping[str, str], h: Tensor, below: Tensor | None) -> Tensor:
        norm, conv = self.get_submodule(paths["norm"]), self.get_submodule(paths["conv"])
        output: Tensor = conv(normalise(norm, h, activation="silu"))
        return output if below is None else self.get_submodule(paths["up"])(below) + output


def build(config: UNetSettings) -> ScoreUNet:
    """Builds the network of a configuration with random weights."""
    return ScoreUNet(config)
