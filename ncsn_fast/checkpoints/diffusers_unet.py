"""UNet2DModel of diffusers, built from its configuration; the package is needed, no file's code."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast.data import limits
from ncsn_fast.models.shapes import shapes_only

CLASS = "UNet2DModel"
_OLD = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def check_config(config: Mapping[str, Any], n_tensors: int) -> None:
    """ValueError for a configuration of another network, or of one larger than its file.

    Args:
        n_tensors: in the file of its weights.
    """
    if config.get("_class_name") != CLASS:
        raise ValueError(f"{CLASS} of diffusers is read, not {config.get('_class_name')!r:.60}")
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(
            f"classes of class_embed_type {kind!r:.60} are not read, only those of "
            "num_class_embeds; build the network, and pass it to ncsn_fast.wrap"
        )
    for name in ("num_class_embeds", "num_train_timesteps"):
        if (count := config.get(name)) is not None and (type(count) is not int or count < 1):
            raise ValueError(f"{name} must be a positive integer; got {count!r:.60}")
    widths: Any = config.get("block_out_channels")
    layers: Any = config.get("layers_per_block", 2)
    channels = [config.get(name, 3) for name in ("in_channels", "out_channels")]
    listed = isinstance(widths, (list, tuple)) and len(widths) > 0
    if not listed or any(type(n) is not int or n < 1 for n in (*widths, layers, *channels)):
        raise ValueError(
            "block_out_channels, layers_per_block, in_channels and out_channels must be positive "
            f"integers; got {widths}, {layers} and {channels}"
        )
    limits.WIDTH.check(max(*widths, *channels), "block_out_channels")
    if len(widths) * layers > n_tensors:
        raise ValueError(
            f"layers_per_block {layers} and {len(widths)} blocks are more than the {n_tensors} "
            "tensors of its file"
        )


def build(config: Mapping[str, Any], n_tensors: int) -> nn.Module:
    """The network of a configuration, without weights, on the meta device.

    Raises:
        ImportError: diffusers is not installed.
        ValueError, TypeError: the configuration is not one of its own.
    """
    check_config(config, n_tensors)
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "reading networks of diffusers needs that package: pip install 'ncsn_fast[diffusers]'"
        ) from error
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about fields of older versions
    try:
        with shapes_only():
            return UNet2DModel.from_config(dict(config)).eval()
    finally:
        logging.disable(before)


def own_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with today's names of attention, in float32."""
    found = {}
    for key, value in state.items():
        if old := _OLD.fullmatch(key):
            key = f"{old[1]}.{_NEW[old[2]]}.{old[3]}"
        found[key] = value.float() if value.is_floating_point() else value
    return found


def identity(config: Mapping[str, Any]) -> str:
    """A SHA-256 of the network's configuration and of the package's version."""
    import diffusers

    described = {name: value for name, value in config.items() if name[:1] != "_"}
    text = json.dumps([diffusers.__version__, torch.__version__, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
