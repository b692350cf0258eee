"""score_sde_pytorch (Song et al. 2021): the network of a state dict, from keys and shapes.

Its networks are a list, all_modules, whose members run in order: the embedding of the noise level,
the blocks of every level down, three in the middle, those of every level up, and the output. What
the weights do not tell (the image's size, the SDE, the filter's taps) is that of the published run
with the same network.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ncsn_fast.checkpoints.sampling_settings import with_ladder
from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.diffusion.spacing import check_ladder
from ncsn_fast.models.published_unets import PUBLISHED_UNETS, PublishedUNet
from ncsn_fast.models.unet_architectures import DDPMConfig, NCSNppConfig
from ncsn_fast.models.unet_config import UNetConfig, preconditioned
from ncsn_fast.notices import notice

log = logging.getLogger(__name__)
NAME = "score_sde_pytorch"
_MODULE = re.compile(r"all_modules\.(\d+)\.(.+)")
_FOLDERS = {"vp": "vp_", "subvp": "subvp_", "ve": ""}  # of the published files, by the SDE
_RUNS = {
    name: run
    for name, run in PUBLISHED_UNETS.items()
    if isinstance(run.network, (NCSNppConfig, DDPMConfig))
}
_SHOWN = (
    "cifar10_ncsnpp_continuous", "cifar10_ncsnpp", "ffhq_256_ncsnpp_continuous",
    "vp_cifar10_ddpmpp", "vp_ddpm_cifar10",
)  # fmt: skip
_UNUSED = 50.0  # the largest of the levels in files of VP networks, which have no use for them
_ATTENDED = 16  # the resolution at which all published networks attend


@functools.cache
def examples() -> Mapping[str, UNetConfig]:
    """Networks of this family by name, for messages about foreign files."""
    return {name: _RUNS[name].config() for name in _SHOWN}


def recognises(state: Mapping[Any, Any], prefix: str = "") -> bool:
    """Tells whether keys, after a prefix, are those of its list of modules."""
    return any(isinstance(key, str) and key.startswith(f"{prefix}all_modules.") for key in state)


def own_state(state: dict[str, Tensor], raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without `sigmas`, which the SDE gives here."""
    return {key: value for key, value in state.items() if key != "sigmas"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A network's hyperparameters, as far as its weights tell them.

    Attributes:
        kind: NCSNppConfig, of DDPM++ too, or DDPMConfig.
        settings: fields of it.
        levels: indices of the levels that attend, the finest is 0.
    """

    kind: type[NCSNppConfig] | type[DDPMConfig]
    settings: dict[str, Any]
    levels: tuple[int, ...]

    def fits(self, run: PublishedUNet) -> bool:
        """Tells whether this is the network of a published run."""
        network = run.network
        if not isinstance(network, self.kind) or not isinstance(
            network, (NCSNppConfig, DDPMConfig)
        ):
            return False
        same = all(getattr(network, name) == value for name, value in self.settings.items())
        return same and self.resolutions(network.image_size) == tuple(network.attn_resolutions)

    def resolutions(self, image_size: int) -> tuple[int, ...]:
        """Resolutions at which the network attends, for an image size."""
        return tuple(image_size >> level for level in self.levels)


def _modules(state: Mapping[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """The kind of every module, and its tensors; ValueError if one is of no known kind."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := _MODULE.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    return [(_kind(index, found[index]), found[index]) for index in sorted(found)]


def _kind(index: int, module: dict[str, Tensor]) -> str:
    weight = module.get("weight")
    if weight is not None and weight.ndim in (1, 2, 4):
        return {1: "norm", 2: "linear", 4: "conv"}[weight.ndim]
    for key, kind in (("Conv2d_0.weight", "residual"), ("NIN_3.W", "attention"), ("W", "features")):
        if key in module:
            return kind
    if "Conv_0.weight" in module:
        return "block" if "GroupNorm_0.weight" in module else "resample"
    raise ValueError(f"all_modules.{index} is no module of its networks: {', '.join(module)}")


def layout(state: Mapping[str, Tensor]) -> Layout:
    """Reads the hyperparameters off keys and shapes.

    ValueError if they are not those of one of its networks.
    """
    modules = _modules(state)
    kinds = [kind for kind, _ in modules]
    blocks = [module for kind, module in modules if kind == "block"]
    first = next((module["weight"] for kind, module in modules if kind == "conv"), None)
    if first is None or not blocks:
        raise ValueError("its all_modules hold no convolution or no blocks")
    nf, channels = first.shape[:2]
    widths = [tuple(block["Conv_0.weight"].shape[:2]) for block in blocks]  # out, in
    plain = any("NIN_0.W" in block for block in blocks)  # DDPM, whose resolution changes between
    changes = kinds.count("resample") if plain else sum(
        "Conv_2.weight" in block and cout == cin
        for block, (cout, cin) in zip(blocks, widths, strict=True)
    )  # fmt: skip
    n_levels = changes // 2 + 1
    rest = len(blocks) - 2 - n_levels - (0 if plain else changes)
    n_blocks = rest // (2 * n_levels)
    if changes % 2 or rest % (2 * n_levels) or n_blocks < 1:
        raise ValueError(f"{len(blocks)} blocks and {changes} changes of resolution make no U-Net")
    every = n_blocks + (0 if plain else 1)  # blocks of a level on the way down
    ends = [widths[level * every + n_blocks - 1][0] for level in range(n_levels)]
    if nf == 0 or any(end % nf for end in ends):
        raise ValueError(f"the widths {ends} are no multiples of {nf}")
    settings: dict[str, Any] = {
        "num_channels": channels, "nf": nf, "ch_mult": tuple(end // nf for end in ends),
        "num_res_blocks": n_blocks,
    }  # fmt: skip
    levels = _attended(kinds, every, n_levels * every - (0 if plain else 1))
    if plain:
        return Layout(DDPMConfig, settings, levels)
    inputs = "residual" if "residual" in kinds else "input_skip" if "resample" in kinds else "none"
    settings |= {
        "embedding_type": "fourier" if "features" in kinds else "positional",
        "progressive_input": inputs,
        "progressive": "output_skip" if n_levels > 1 and kinds.count("norm") > 1 else "none",
    }
    return Layout(NCSNppConfig, settings, levels)


def _attended(kinds: list[str], every: int, n_down: int) -> tuple[int, ...]:
    """Levels whose blocks are followed by attention, on the way down."""
    seen, levels = 0, []
    for kind in kinds:
        seen += kind == "block"
        if seen > n_down:
            break
        if kind == "attention" and seen and (seen - 1) // every not in levels:
            levels.append((seen - 1) // every)
    return tuple(levels)


def infer_config(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> UNetConfig:
    """UNetConfig of a network of score_sde, completed by the published run that fits best.

    Args:
        overrides: `run`, the name of a published run; image_size; fields of the ladder.
    """
    given = dict(overrides)
    try:
        found = layout(state)
        name, why = _run(found, state, given.pop("run", None), path)
        config = _complete(found, _RUNS[name], state.get("sigmas"), given.pop("image_size", None))
        config = with_ladder(config, given)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path}, of {NAME}: {error}") from error
    notice(
        log,
        "%s: image size %d, SDE %s and noise levels %.4g to %.4g are those of %s, %s; "
        "run=NAME takes another",
        path, config.image_size[0], _RUNS[name].preconditioning, config.sigma_begin,
        config.sigma_end, name, why,
    )  # fmt: skip
    return config


def _run(found: Layout, state: Mapping[str, Tensor], name: Any, path: Path) -> tuple[str, str]:
    """The published run that a network is most like, and why; by the path between equals."""
    if name is not None:
        if name not in _RUNS:
            raise ValueError(f"run must be one of {', '.join(_RUNS)}; got {name!r}")
        return name, "which was given"
    parts = {*path.parts, path.stem}
    levels = _levels(state.get("sigmas"))
    largest = levels[0] if levels else 0.0

    def likeness(name: str) -> tuple[int, bool, int]:
        run, bare = _RUNS[name], name.removeprefix("subvp_").removeprefix("vp_")
        expected = run.sigma_max or _UNUSED
        folder = next(sde for sde, prefix in _FOLDERS.items() if name == prefix + bare)
        return (
            _common(found, run),
            abs((largest or expected) / expected - 1) < 1e-3,
            (folder in parts) + 2 * (bare in parts or name in parts),
        )

    best = max(_RUNS, key=likeness)
    if not found.fits(_RUNS[best]):
        return best, "whose network is the nearest"
    equal = [other for other in _RUNS if other != best and found.fits(_RUNS[other])]
    return best, "which has this network" + (f", as has {', '.join(equal)}" if equal else "")


def _levels(sigmas: Tensor | None) -> list[float] | None:
    """The noise levels in a file, descending; None without any. ValueError if they are none."""
    return None if sigmas is None else check_ladder(sigmas).tolist()


def _common(found: Layout, run: PublishedUNet) -> int:
    """The number of settings that a network has in common with a published one."""
    if not isinstance(run.network, found.kind):
        return -1
    network: Any = run.network
    same = sum(getattr(network, name) == value for name, value in found.settings.items())
    return same + (found.resolutions(network.image_size) == tuple(network.attn_resolutions))


def _complete(
    found: Layout, run: PublishedUNet, sigmas: Tensor | None, image_size: Any
) -> UNetConfig:
    """The description of a network, with what a published run and the file's noise levels say."""
    network: Any = run.network
    if image_size is None:
        image_size = network.image_size
        if found.resolutions(image_size) != tuple(network.attn_resolutions) and found.levels:
            image_size = _ATTENDED << found.levels[0]
    elif isinstance(image_size, (tuple, list)):
        if len({*image_size}) != 1:
            raise ValueError(f"these networks have square images; got image_size {image_size}")
        image_size = image_size[0]
    if type(image_size) is not int:
        raise ValueError(f"image_size must be an integer; got {image_size!r}")
    settings = {
        **found.settings, "image_size": image_size, "centered": network.centered,
        "attn_resolutions": found.resolutions(image_size),
    }  # fmt: skip
    if found.kind is NCSNppConfig:
        pyramids = {settings["progressive_input"], settings["progressive"]} != {"none"}
        settings["fir"] = pyramids or getattr(network, "fir", False)
    kind: Any = type(network) if isinstance(network, found.kind) else found.kind
    n, ends = run.n, {"sigma_max": run.sigma_max}
    if run.sigma_max and (levels := _levels(sigmas)) is not None:
        n, ends = len(levels), {"sigma_max": levels[0], "sigma_min": levels[-1]}
    return preconditioned(kind(**settings), run.preconditioning, n=n, **ends)
