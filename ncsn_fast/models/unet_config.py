"""UNetConfig: the description of a model that has a U-Net of score_sde or EDM.

It holds the network's hyperparameters and its parameterisation; the preconditionings of both code
bases are in a table by name. Noise levels are in the unit of this package's x, images in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ncsn_fast.data.json_file import plain
from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.parameterisation import (
    IDDPM,
    DiscreteVP,
    Parameterisation,
    standard,
)
from ncsn_fast.diffusion.sde import VP, SubVP
from ncsn_fast.models.adapter import ParameterisedConfig, check_chain, read_parameterisation
from ncsn_fast.models.unet_architectures import (
    PRECONDITIONINGS,
    UNETS,
    DhariwalUNetConfig,
    SongUNetConfig,
    UNetSettings,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UNetConfig(ParameterisedConfig):
    """Description of a model with a U-Net of score_sde or EDM.

    Attributes:
        network: its hyperparameters, a dataclass of unet_architectures.py.
        parameterisation: of the network, one that `standard` makes.
    """

    network: UNetSettings

    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.network, UNetSettings):
            raise ValueError(f"network must be one of {', '.join(UNETS)}; got {self.network!r}")
        if self.parameterisation.spec is None or self.parameterisation.c_noise is None:
            raise ValueError("a U-Net needs a parameterisation of `standard` that sees the noise")
        self.check_steps()
        schedule.geometric(self.sigma_begin, self.sigma_end, self.n_sigmas)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UNetConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.network, self.n_sigmas, self.sigma_begin, self.sigma_end))

    @classmethod
    def make(
        cls,
        network: UNetSettings,
        parameterisation: Parameterisation,
        sigma_min: float,
        sigma_max: float,
        *,
        n_sigmas: int | None = None,
        n_steps_each: int = 1,
        epsilon: float | None = None,
    ) -> UNetConfig:
        """Returns a description, with the noise levels in the unit of the network's data.

        n_sigmas and epsilon of None are those of Techniques 2 and 4.
        """
        shape, scale = network.shape, parameterisation.data_scale
        process = parameterisation.process
        if n_sigmas is None and isinstance(process, DiscreteVP):
            n_sigmas = process.n
        if n_sigmas is None:
            dim = shape.channels * shape.resolution**2
            n_sigmas = schedule.usual_n_sigmas(sigma_max, sigma_min, dim)
        high, low = sigma_max / scale, sigma_min / scale
        if epsilon is None:
            ladder = schedule.geometric(high, low, n_sigmas).double().numpy()
            epsilon = schedule.usual_epsilon(ladder, n_steps_each)
        return cls(
            network=network, parameterisation=parameterisation, n_sigmas=n_sigmas,
            sigma_begin=high, sigma_end=low, epsilon=epsilon, n_steps_each=n_steps_each,
        )  # fmt: skip

    @property
    def arch(self) -> str:
        """Name of the network's kind, a key of UNETS."""
        return self.network.arch

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.network.shape.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return (self.network.shape.resolution, self.network.shape.resolution)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return (self.channels, *self.image_size)

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 for a network without labels."""
        return self.network.embedding.labels

    def ladder(self) -> Tensor:
        """Returns the noise levels, descending float32: geometric, or those of a discrete chain."""
        process = self.parameterisation.process
        if isinstance(process, DiscreteVP) and process.n == self.n_sigmas:
            levels = process.sigmas[::-1] / self.parameterisation.data_scale
            return torch.from_numpy(levels.astype(np.float32))
        return super().ladder()

    def to_dict(self) -> dict[str, Any]:
        """Returns values for JSON."""
        assert self.parameterisation.spec is not None
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        network = {"arch": self.arch, **self.network.to_dict()}
        return {**values, "network": network,
                "parameterisation": plain(dict(self.parameterisation.spec))}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Returns the description that `to_dict` gave; ValueError or TypeError if it is none."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model config fields: {', '.join(unknown)}")
        if missing := sorted({"network", "parameterisation"} - set(values)):
            raise ValueError(f"missing model config fields: {', '.join(missing)}")
        fields = dict(values)
        network = dict(fields["network"])
        arch = network.pop("arch", None)
        if arch not in UNETS:
            raise ValueError(f"arch must be one of {', '.join(UNETS)}; got {arch!r}")
        fields["network"] = UNETS[arch].from_kwargs(network)
        fields["parameterisation"] = read_parameterisation(fields["parameterisation"])
        return cls(**fields)


_CENTRED = (-1.0, 1.0)
_LAST_TIME = 1e-3  # at which score_sde's samplers of VP and sub-VP SDEs end
_VP: dict[str, VP] = {"vp": VP(), "sub_vp": SubVP()}


def preconditioned(
    network: UNetSettings,
    kind: str,
    *,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
    n: int = 1000,
    **langevin: Any,
) -> UNetConfig:
    """Returns the description of a published way to use a network.

    Args:
        kind: of score_sde, "ve" (the network sees sigma), "discrete_ve" (the index of the nearest
            of n levels), "vp" and "sub_vp" (999 t; it predicts the noise) or "discrete_vp" (the
            nearest index of DDPM's chain of n steps); or the name of a wrapper of EDM.
        sigma_min, sigma_max: the ends of VE's noise levels.
        n: steps of score_sde's sampler.
        langevin: n_steps_each and epsilon, as for `UNetConfig.make`.
    """
    if kind in _EDM_ARGUMENTS:
        known, low, high = _preconditioning(kind, _EDM_ARGUMENTS[kind])
        return UNetConfig.make(network, known, low, high, **langevin)
    if kind in _VP:
        process = _VP[kind]
        known = standard(
            "epsilon", sees="time", process=process, time_scale=999.0, data_range=_CENTRED
        )
        low, high = (float(process.noise_level(t)) for t in (_LAST_TIME, 1.0))
    elif kind == "discrete_vp":
        chain = DiscreteVP(n, rounded=True)
        known = standard("epsilon", sees="timestep", process=chain, data_range=_CENTRED)
        low, high = float(chain.sigmas[0]), float(chain.sigmas[-1])
    elif kind == "ve":
        known, low, high = standard("scaled_score", sees="sigma"), sigma_min, sigma_max
    elif kind == "discrete_ve":
        low, high = sigma_min, sigma_max
        levels = np.exp(np.linspace(np.log(high), np.log(low), n))
        known = standard("scaled_score", sees="level", sigmas=tuple(levels.tolist()))
    else:
        raise ValueError(f"a preconditioning is one of {', '.join(PRECONDITIONINGS)}; got {kind!r}")
    return UNetConfig.make(network, known, low, high, n_sigmas=n, **langevin)


# EDM's wrappers: their own arguments beside those of the network, with the defaults.
_EDM_ARGUMENTS: dict[str, dict[str, Any]] = {
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
}
_EDM_NETWORKS: dict[str, type[UNetSettings]] = {
    "SongUNet": SongUNetConfig, "DhariwalUNet": DhariwalUNetConfig
}  # fmt: skip
_EDM_ENDS = (0.002, 80.0)  # Karras et al. 2022, table 1


def edm_config(wrapper: str, arguments: Mapping[str, Any]) -> UNetConfig:
    """Returns the description of one of EDM's networks, from the arguments of its wrapper.

    Args:
        wrapper: VPPrecond, VEPrecond, iDDPMPrecond or EDMPrecond.
        arguments: all constructor arguments: img_resolution, img_channels, label_dim, use_fp16 (of
            no effect here), the wrapper's own, model_type, and those of the network.

    Raises:
        ValueError: unknown names, wrong types, or constants that are not supported.
    """
    if wrapper not in _EDM_ARGUMENTS:
        raise ValueError(f"a wrapper of EDM is one of {', '.join(_EDM_ARGUMENTS)}; got {wrapper!r}")
    values = dict(arguments)
    values.pop("use_fp16", None)
    own = {k: values.pop(k, default) for k, default in _EDM_ARGUMENTS[wrapper].items()}
    if wrong := sorted(k for k, v in own.items() if type(v) not in (int, float)):
        raise ValueError(f"{', '.join(wrong)} of {wrapper} must be numbers")
    usual = "SongUNet" if wrapper in ("VPPrecond", "VEPrecond") else "DhariwalUNet"
    kind = values.pop("model_type", usual)
    if kind not in _EDM_NETWORKS:
        raise ValueError(f"model_type must be one of {', '.join(_EDM_NETWORKS)}; got {kind!r}")
    channels = values.pop("img_channels", None)
    if type(channels) is not int:
        raise ValueError(f"img_channels must be an integer; got {channels!r}")
    outputs = 2 * channels if wrapper == "iDDPMPrecond" else channels
    network = _EDM_NETWORKS[kind].from_kwargs(
        {**values, "in_channels": channels, "out_channels": outputs}
    )
    known, low, high = _preconditioning(wrapper, own)
    return UNetConfig.make(network, known, low, high)


def _preconditioning(wrapper: str, own: Mapping[str, Any]) -> tuple[Parameterisation, float, float]:
    """Returns a wrapper's parameterisation, and the least and largest noise level."""
    if wrapper == "VPPrecond":
        process = VP(own["beta_min"], own["beta_min"] + own["beta_d"])
        known = standard(
            "epsilon", sees="time", process=process, time_scale=float(own["M"] - 1),
            data_range=_CENTRED,
        )  # fmt: skip
        low, high = (float(process.noise_level(t)) for t in (float(own["epsilon_t"]), 1.0))
        return known, low, high
    if wrapper == "VEPrecond":
        known = standard("scaled_score", sees="log_half_sigma", data_range=_CENTRED)
        return known, float(own["sigma_min"]), float(own["sigma_max"])
    if wrapper == "iDDPMPrecond":
        if (own["C_1"], own["C_2"]) != (0.001, 0.008):
            raise ValueError(
                f"iDDPMPrecond has C_1 0.001 and C_2 0.008; got {own['C_1']} and {own['C_2']}"
            )
        check_chain(own["M"])
        chain = IDDPM(own["M"])
        known = standard("epsilon", sees="timestep", process=chain, data_range=_CENTRED)
        return known, float(chain.sigmas[0]), float(chain.sigmas[-1])
    known = standard("edm", sigma_data=float(own["sigma_data"]), data_range=_CENTRED)
    low = max(float(own["sigma_min"]), _EDM_ENDS[0])
    return known, low, min(float(own["sigma_max"]), _EDM_ENDS[1])
