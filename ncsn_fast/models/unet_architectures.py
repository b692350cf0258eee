"""The U-Nets of score_sde and EDM: their hyperparameters, and the names of their parameters.

Each network is a dataclass whose fields are named as in the published configurations or
constructors; it says which Shape, Style and Embedding it has (unet_table.py). This file is apart
from the modules, because the command line reads it before torch is imported.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ncsn_fast.data import limits
from ncsn_fast.data.json_file import make_plain
from ncsn_fast.models.unet_table import Embedding, Pyramid, Row, Shape, Style, table

_SQUARE = (1.0, 1.0)
_SCORE_SDE_NAMES = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")
_EDM_NAMES = ("norm0", "conv0", "affine", "norm1", "conv1", "skip")


class UNetSettings(abc.ABC):
    """Hyperparameters of a U-Net: what its five kinds share.

    Fields are named as in the published configurations and constructors.
    """

    arch: ClassVar[str]
    # Fields for the resolution, image channels (of input and output), width, multiples of it,
    # blocks, resolutions of attention, and dropout.
    fields: ClassVar[tuple[tuple[str, ...], ...]]

    @property
    @abc.abstractmethod
    def shape(self) -> Shape:
        """Numbers of the network."""

    @property
    @abc.abstractmethod
    def style(self) -> Style:
        """Computation of its blocks."""

    @property
    @abc.abstractmethod
    def embedding(self) -> Embedding:
        """Embedding of the noise level."""

    @abc.abstractmethod
    def paths(self) -> Iterator[dict[str, str]]:
        """Yields the names of the embedding's modules, then of those of each row, by their part."""

    def __post_init__(self) -> None:
        make_plain(self)
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is not ClassVar and not _is_a(value := getattr(self, name), kind):
                raise ValueError(f"{name} of {self.arch} must be {_words(kind)}; got {value!r}")
        shape, embedding = self.shape, self.embedding
        widths = (shape.first, *shape.widths, embedding.width)
        least = {
            "the resolution": (1, shape.resolution),
            "the number of levels": (1, len(shape.widths)),
            "the image's channels": (1, min(shape.channels, shape.out_channels)),
            "every width": (4, min(widths)),
            "the width of the noise level": (4, embedding.features),
            "the number of blocks": (0, shape.n_blocks),
            "the numbers of labels": (0, min(embedding.labels, embedding.augment)),
        }  # fmt: skip
        for name, (low, value) in least.items():
            if value < low:
                raise ValueError(f"{name} of {self.arch} must be at least {low}; got {value}")
        limits.IMAGE_SIZE.check(shape.resolution, f"{self.arch} of {shape.resolution} pixels")
        more = (shape.channels, shape.out_channels, embedding.features)
        limits.WIDTH.check(max(*widths, *more), f"the widest layer of {self.arch}")
        limits.WIDTH.check(max(embedding.labels, embedding.augment), f"the labels of {self.arch}")
        limits.BLOCKS.check(len(shape.widths) * (2 * shape.n_blocks + 4), self.arch)
        self._check_values()

    def _check_values(self) -> None:
        """ValueError for numbers that do not fit each other."""
        shape, style, embedding = self.shape, self.style, self.embedding
        if shape.resolution % shape.size_multiple:
            raise ValueError(
                f"the resolution must be a multiple of {shape.size_multiple} for "
                f"{len(shape.widths)} levels of {self.arch}; got {shape.resolution}"
            )
        if embedding.features % 2:
            raise ValueError(f"the width of the noise level must be even; got {embedding.features}")
        if not (0 <= style.dropout < 1 and 0 <= embedding.label_dropout <= 1):
            raise ValueError(f"dropouts of {self.arch} must be probabilities, below 1")
        if len(style.filter) % 2 or not all(0 < tap < math.inf for tap in style.filter):
            raise ValueError(
                f"the filter must be an even number of positive taps; got {style.filter}"
            )
        for row in table(shape):
            for channels in {row.cin + row.skip, row.cout} if row.kind == "block" else {row.cin}:
                if row.kind in ("block", "output") and channels % style.groups(channels):
                    raise ValueError(
                        f"{channels} channels of {self.arch} cannot be cut into "
                        f"{style.groups(channels)} equal groups, which its group norms have"
                    )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of its fields."""
        assert dataclasses.is_dataclass(cls)
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def sized(
        cls,
        resolution: int,
        channels: int,
        width: int,
        multiples: tuple[int, ...],
        n_blocks: int,
        attention: tuple[int, ...],
        dropout: float,
        **others: Any,
    ) -> UNetSettings:
        """Returns settings of any kind by what all kinds have; `others` are the kind's own."""
        values = (resolution, channels, width, multiples, n_blocks, attention, dropout)
        own = {n: v for names, v in zip(cls.fields, values, strict=True) for n in names}
        found = cls.from_kwargs({**own, **others})
        assert isinstance(found, UNetSettings)
        return found

    @classmethod
    def from_kwargs(cls, values: Mapping[str, Any]) -> Any:
        """Returns the settings of published constructor arguments, or of JSON.

        Lists become tuples. ValueError names unknown fields and values of a wrong type.
        """
        if unknown := sorted(set(map(str, values)) - set(cls.names())):
            raise ValueError(f"unknown settings of {cls.arch}: {', '.join(unknown)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings for JSON."""
        assert dataclasses.is_dataclass(self)
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _is_a(value: Any, kind: Any) -> bool:
    """Tells whether a value is of an annotated type: a class, a Literal or tuple[class, ...]."""
    if get_origin(kind) is Literal:
        return value in get_args(kind) and type(value) is str
    if get_origin(kind) is tuple:
        inner = (int, float) if get_args(kind)[0] is float else (int,)
        return type(value) is tuple and all(type(item) in inner for item in value)
    return type(value) is kind


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list of {'numbers' if get_args(kind)[0] is float else 'integers'}"
    return {int: "an integer", float: "a number", bool: "true or false"}.get(kind, str(kind))


def _score_sde_paths(rows: list[Row], embedding: Embedding) -> Iterator[dict[str, str]]:
    """Yields the names in score_sde's networks: one list of modules, in the order they run."""
    index = itertools.count()

    def module(child: str = "") -> str:
        return f"all_modules.{next(index)}{child}"

    features = module() if embedding.kind == "fourier" else "features"
    yield {"features": features, "layer0": module(), "layer1": module()}
    children = {"conv": "", "resample": ".Conv_0", "skip": ".Conv_0", "residual": ".Conv2d_0"}
    for row in rows:
        if row.kind == "block":
            block = {"block": module()}
            yield {**block, "attention": module()} if row.heads else block
        elif row.kind == "output":
            up = f"output_pyramid.{row.resolution}"  # without weights
            yield {"up": up, "norm": module(), "conv": module()}
        else:
            down = f"input_pyramid.{row.resolution}"
            yield {"down": down, "conv": module(children[row.pyramid or row.kind])}


def _edm_paths(rows: list[Row]) -> Iterator[dict[str, str]]:
    """Yields the names in EDM's networks, which tell the part, the resolution and the role."""
    labels = {"labels": "map_label", "augment": "map_augment"}
    yield {"features": "map_noise", **labels, "layer0": "map_layer0", "layer1": "map_layer1"}
    for row in rows:
        at = f"{'dec' if row.decoder else 'enc'}.{row.resolution}x{row.resolution}_{row.role}"
        if row.kind == "output":
            yield {"up": f"{at}_up", "norm": f"{at}_norm", "conv": f"{at}_conv"}
        elif row.kind == "pyramid":
            residual = row.pyramid == "residual"
            yield (
                {"conv": f"{at}_residual"}
                if residual
                else {"down": f"{at}_down", "conv": f"{at}_skip"}
            )
        else:
            yield {row.kind: at}


_SCORE_SDE_FIELDS = (
    ("image_size",), ("num_channels",), ("nf",), ("ch_mult",), ("num_res_blocks",),
    ("attn_resolutions",), ("dropout",),
)  # fmt: skip
_EDM_FIELDS = (
    ("img_resolution",), ("in_channels", "out_channels"), ("model_channels",), ("channel_mult",),
    ("num_blocks",), ("attn_resolutions",), ("dropout",),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NCSNppConfig(UNetSettings):
    """NCSN++ and DDPM++ of score_sde (Song et al. 2021); the defaults are NCSN++ (VE, continuous).

    The output is not divided by sigma, whatever `scale_by_sigma` was: the parameterisation does it.

    Attributes:
        progressive, progressive_input: pyramids of the image, to the output and from the input.
        fir: whether resampling takes fir_kernel, or squares of 2x2.
        centered: whether images are in [-1, 1]; the network itself computes 2x - 1 of others.
    """

    arch: ClassVar[str] = "ncsnpp"
    fields: ClassVar[tuple[tuple[str, ...], ...]] = _SCORE_SDE_FIELDS
    image_size: int = 32
    num_channels: int = 3
    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    embedding_type: Literal["fourier", "positional"] = "fourier"
    fourier_scale: float = 16.0
    progressive: Literal["none", "output_skip"] = "none"
    progressive_input: Literal["none", "input_skip", "residual"] = "residual"
    fir: bool = True
    fir_kernel: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    skip_rescale: bool = True
    centered: bool = False

    def _check_values(self) -> None:
        super()._check_values()
        if self.progressive_input == "residual" and not self.fir:
            raise ValueError("progressive_input 'residual' needs fir true")

    @property
    def shape(self) -> Shape:
        inputs: dict[str, Pyramid] = {"none": "", "input_skip": "skip", "residual": "residual"}
        return Shape(
            self.image_size, self.num_channels, self.num_channels, self.nf,
            tuple(self.nf * m for m in self.ch_mult), self.num_res_blocks, self.attn_resolutions,
            input=inputs[self.progressive_input],
            output="skip" if self.progressive == "output_skip" else "",
        )  # fmt: skip

    @property
    def style(self) -> Style:
        return Style(
            _SCORE_SDE_NAMES,
            scale=math.sqrt(0.5) if self.skip_rescale else 1.0,
            filter=self.fir_kernel if self.fir else _SQUARE,
            dropout=self.dropout,
        )

    @property
    def embedding(self) -> Embedding:
        if self.embedding_type == "positional":
            return Embedding("positional", self.nf, 4 * self.nf)
        return Embedding("fourier", 2 * self.nf, 4 * self.nf, log=True, scale=self.fourier_scale)

    def paths(self) -> Iterator[dict[str, str]]:
        return _score_sde_paths(table(self.shape), self.embedding)


@dataclasses.dataclass(frozen=True)
class DDPMppConfig(NCSNppConfig):
    """DDPM++ of score_sde: NCSN++ with other settings."""

    arch: ClassVar[str] = "ddpmpp"
    embedding_type: Literal["fourier", "positional"] = "positional"
    progressive_input: Literal["none", "input_skip", "residual"] = "none"
    fir: bool = False
    centered: bool = True


@dataclasses.dataclass(frozen=True)
class DDPMConfig(UNetSettings):
    """DDPM of score_sde (Ho et al. 2020), whose resolution changes in convolutions."""

    arch: ClassVar[str] = "ddpm"
    fields: ClassVar[tuple[tuple[str, ...], ...]] = _SCORE_SDE_FIELDS
    image_size: int = 32
    num_channels: int = 3
    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    centered: bool = True

    @property
    def shape(self) -> Shape:
        return Shape(
            self.image_size, self.num_channels, self.num_channels, self.nf,
            tuple(self.nf * m for m in self.ch_mult), self.num_res_blocks, self.attn_resolutions,
            resampling="resample",
        )  # fmt: skip

    @property
    def style(self) -> Style:
        names = (*_SCORE_SDE_NAMES[:5], "NIN_0")
        return Style(names, group_channels=0, scale=1.0, matrix_skip=True, dropout=self.dropout)

    @property
    def embedding(self) -> Embedding:
        return Embedding("positional", self.nf, 4 * self.nf)

    def paths(self) -> Iterator[dict[str, str]]:
        return _score_sde_paths(table(self.shape), self.embedding)


@dataclasses.dataclass(frozen=True)
class SongUNetConfig(UNetSettings):
    """SongUNet of EDM: DDPM++ with the defaults; NCSN++ as in `ncsnpp`.

    Attributes:
        label_dim: number of classes.   augment_dim: width of the augmentation labels.
        label_dropout: probability of leaving out the class in training.
    """

    arch: ClassVar[str] = "songunet"
    fields: ClassVar[tuple[tuple[str, ...], ...]] = _EDM_FIELDS
    img_resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[float, ...] = (1.0, 1.0)

    @classmethod
    def ncsnpp(cls, **settings: Any) -> SongUNetConfig:
        """Returns EDM's NCSN++."""
        known: dict[str, Any] = {
            "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
            "resample_filter": (1.0, 3.0, 3.0, 1.0),
        }  # fmt: skip
        return cls(**{**known, **settings})

    @property
    def shape(self) -> Shape:
        pyramids: dict[str, Pyramid] = {"standard": "", "skip": "skip", "residual": "residual"}
        return Shape(
            self.img_resolution, self.in_channels, self.out_channels, self.model_channels,
            tuple(self.model_channels * m for m in self.channel_mult), self.num_blocks,
            self.attn_resolutions,
            input=pyramids[self.encoder_type], output=pyramids[self.decoder_type],
        )  # fmt: skip

    @property
    def style(self) -> Style:
        return Style(
            _EDM_NAMES, filter=self.resample_filter, keep_filter=True, dropout=self.dropout
        )

    @property
    def embedding(self) -> Embedding:
        return Embedding(
            self.embedding_type, self.model_channels * self.channel_mult_noise,
            self.model_channels * self.channel_mult_emb, labels=self.label_dim,
            augment=self.augment_dim, label_dropout=self.label_dropout,
        )  # fmt: skip

    def paths(self) -> Iterator[dict[str, str]]:
        return _edm_paths(table(self.shape))


@dataclasses.dataclass(frozen=True)
class DhariwalUNetConfig(UNetSettings):
    """DhariwalUNet of EDM: the ADM network (Dhariwal and Nichol 2021)."""

    arch: ClassVar[str] = "dhariwal"
    fields: ClassVar[tuple[tuple[str, ...], ...]] = _EDM_FIELDS
    img_resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    label_dropout: float = 0.0

    @property
    def shape(self) -> Shape:
        widths = tuple(self.model_channels * m for m in self.channel_mult)
        return Shape(
            self.img_resolution, self.in_channels, self.out_channels, widths[0] if widths else 0,
            widths, self.num_blocks, self.attn_resolutions, head_channels=64, attends="all",
        )  # fmt: skip

    @property
    def style(self) -> Style:
        return Style(
            _EDM_NAMES, eps=1e-5, scale=1.0, adaptive=True, always_skip=False, keep_filter=True,
            dropout=self.dropout,
        )  # fmt: skip

    @property
    def embedding(self) -> Embedding:
        return Embedding(
            "positional", self.model_channels, self.model_channels * self.channel_mult_emb,
            endpoint=False, cos_first=True, labels=self.label_dim, augment=self.augment_dim,
            labels_last=True, label_dropout=self.label_dropout,
        )  # fmt: skip

    def paths(self) -> Iterator[dict[str, str]]:
        *paths, _ = _edm_paths(table(self.shape))
        yield from paths
        yield {"norm": "out_norm", "conv": "out_conv"}


UNETS: dict[str, type[UNetSettings]] = {
    kind.arch: kind
    for kind in (NCSNppConfig, DDPMppConfig, DDPMConfig, SongUNetConfig, DhariwalUNetConfig)
}

# Published ways to use a network (unet_config.py).
SCORE_SDE_PRECONDITIONINGS = ("ve", "discrete_ve", "vp", "sub_vp", "discrete_vp")
EDM_PRECONDITIONINGS = ("VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond")
PRECONDITIONINGS = (*SCORE_SDE_PRECONDITIONINGS, *EDM_PRECONDITIONINGS)
