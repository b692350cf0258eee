"""The published U-Nets of score_sde and EDM: networks and noise levels, in one table.

Names are those of score_sde's configurations, with "vp_" or "subvp_" for the folder of those that
are not VE, and those of EDM's files. This file needs no torch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ncsn_fast.models.unet_architectures import (
    DDPMConfig,
    DDPMppConfig,
    DhariwalUNetConfig,
    NCSNppConfig,
    SongUNetConfig,
    UNetSettings,
)

if TYPE_CHECKING:
    from ncsn_fast.models.unet_config import UNetConfig


@dataclasses.dataclass(frozen=True)
class PublishedUNet:
    """A published network and its noise levels.

    Attributes:
        network: its hyperparameters.
        preconditioning: "ve", "discrete_ve", "vp", "sub_vp" or "discrete_vp" of score_sde, or the
            name of one of EDM's wrappers.
        sigma_max: the largest noise level of VE, whose smallest is 0.01.
        n: steps of the published sampler.
        n_parameters: of the network; 0 where it is not stated.
    """

    network: UNetSettings
    preconditioning: str
    sigma_max: float = 0.0
    n: int = 1000
    n_parameters: int = 0

    def config(self) -> UNetConfig:
        """Returns the description of the model; it imports torch."""
        from ncsn_fast.models import unet_config

        return unet_config.preconditioned(
            self.network, self.preconditioning, sigma_max=self.sigma_max, n=self.n
        )


def _ncsnpp_ve(sigma_max: float, n: int, n_parameters: int = 0, **network: Any) -> PublishedUNet:
    discrete = network.get("embedding_type") == "positional"
    kind = "discrete_ve" if discrete else "ve"
    return PublishedUNet(NCSNppConfig(**network), kind, sigma_max, n, n_parameters)


def _ncsnpp_large(sigma_max: float, n_parameters: int, **network: Any) -> PublishedUNet:
    return _ncsnpp_ve(
        sigma_max, 2000, n_parameters, progressive="output_skip", progressive_input="input_skip",
        **network,
    )  # fmt: skip


def _ncsnpp_256(sigma_max: float) -> PublishedUNet:
    return _ncsnpp_large(
        sigma_max, 65_574_549, image_size=256, ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2
    )


_NCSNPP_1024 = _ncsnpp_large(
    1348.0, 105_785_896, image_size=1024, nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32),
    num_res_blocks=1,
)  # fmt: skip
_DEEP: dict[str, Any] = {"num_res_blocks": 8}
# NCSN++ as it is trained on VP and sub-VP SDEs.
_OF_VP: dict[str, Any] = {"embedding_type": "positional", "centered": True}
_DDPM_256 = PublishedUNet(DDPMConfig(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4)), "discrete_vp")

_SCORE_SDE: dict[str, PublishedUNet] = {
    "cifar10_ncsnpp": _ncsnpp_ve(50.0, 1000, 62_693_251, embedding_type="positional"),
    "cifar10_ncsnpp_continuous": _ncsnpp_ve(50.0, 1000, 62_758_915),
    "cifar10_ncsnpp_deep_continuous": _ncsnpp_ve(50.0, 1000, 107_587_075, **_DEEP),
    "celeba_ncsnpp": _ncsnpp_ve(90.0, 1000, 62_693_251, embedding_type="positional", image_size=64),
    "bedroom_ncsnpp_continuous": _ncsnpp_256(378.0),
    "church_ncsnpp_continuous": _ncsnpp_256(380.0),
    "celebahq_256_ncsnpp_continuous": _ncsnpp_256(348.0),
    "ffhq_256_ncsnpp_continuous": _ncsnpp_256(348.0),
    "celebahq_ncsnpp_continuous": _NCSNPP_1024,
    "ffhq_ncsnpp_continuous": _NCSNPP_1024,
    "vp_cifar10_ddpmpp": PublishedUNet(DDPMppConfig(), "discrete_vp", n_parameters=61_804_419),
    "vp_cifar10_ncsnpp": PublishedUNet(NCSNppConfig(**_OF_VP), "discrete_vp"),
    "vp_ddpm_cifar10": PublishedUNet(DDPMConfig(), "discrete_vp", n_parameters=35_218_947),
    "vp_ddpm_bedroom": _DDPM_256,
    "vp_ddpm_celebahq": _DDPM_256,
    "vp_ddpm_church": _DDPM_256,
}
for _name, _kind in (("vp", "vp"), ("subvp", "sub_vp")):
    _SCORE_SDE |= {
        f"{_name}_cifar10_ddpmpp_continuous": PublishedUNet(
            DDPMppConfig(), _kind, n_parameters=61_804_419
        ),
        f"{_name}_cifar10_ddpmpp_deep_continuous": PublishedUNet(DDPMppConfig(**_DEEP), _kind),
        f"{_name}_cifar10_ncsnpp_continuous": PublishedUNet(NCSNppConfig(**_OF_VP), _kind),
        f"{_name}_cifar10_ncsnpp_deep_continuous": PublishedUNet(
            NCSNppConfig(**_OF_VP, **_DEEP), _kind
        ),
        f"{_name}_ddpm_cifar10_continuous": PublishedUNet(
            DDPMConfig(), _kind, n_parameters=35_218_947
        ),
    }


def _song(kind: str, **network: Any) -> SongUNetConfig:
    """Returns a SongUNet of EDM's own training; "vp" is DDPM++, and "ve" is NCSN++."""
    network = {"augment_dim": 9, **network}
    return SongUNetConfig.ncsnpp(**network) if kind == "ve" else SongUNetConfig(**network)


_EDM: dict[str, PublishedUNet] = {}
for _kind, _counts in (
    ("vp", (55_733_891, 55_735_299, 61_805_571)),
    ("ve", (56_397_827, 56_400_643, 62_761_091)),
):
    _cifar10 = {"channel_mult": (2, 2, 2), "dropout": 0.13}
    _EDM |= {
        f"edm-cifar10-32x32-uncond-{_kind}": PublishedUNet(
            _song(_kind, **_cifar10), "EDMPrecond", n_parameters=_counts[0]
        ),
        f"edm-cifar10-32x32-cond-{_kind}": PublishedUNet(
            _song(_kind, label_dim=10, **_cifar10), "EDMPrecond", n_parameters=_counts[1]
        ),
        f"edm-ffhq-64x64-uncond-{_kind}": PublishedUNet(
            _song(_kind, img_resolution=64, dropout=0.05), "EDMPrecond", n_parameters=_counts[2]
        ),
        f"edm-afhqv2-64x64-uncond-{_kind}": PublishedUNet(
            _song(_kind, img_resolution=64, dropout=0.25), "EDMPrecond", n_parameters=_counts[2]
        ),
        f"baseline-cifar10-32x32-uncond-{_kind}": PublishedUNet(
            _song(_kind, augment_dim=0), "VEPrecond" if _kind == "ve" else "VPPrecond"
        ),
    }
_EDM |= {
    "edm-imagenet-64x64-cond-adm": PublishedUNet(
        DhariwalUNetConfig(label_dim=1000), "EDMPrecond", n_parameters=295_899_267
    ),
    "baseline-imagenet-64x64-cond-adm": PublishedUNet(
        DhariwalUNetConfig(label_dim=1000, out_channels=6), "iDDPMPrecond"
    ),
}

PUBLISHED_UNETS: dict[str, PublishedUNet] = {**_SCORE_SDE, **_EDM}
