"""Files as EDM's code writes them, and the golden weights of its networks."""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """Generates a weight of these networks by the golden files' recipe."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith(".freqs"):
        z = 2 * z
    elif key.endswith("bias"):
        z = 0.1 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def resampling_filter(meta: Mapping[str, Any]) -> Tensor:
    """Returns a network's filter f as their buffer, f f^T / (sum of f)^2."""
    taps = torch.tensor(meta["kwargs"].get("resample_filter", [1, 1]), dtype=torch.float32)
    return (taps.outer(taps) / taps.sum() ** 2)[None, None]


def _rebuild(described: dict[str, Any]) -> None:
    raise AssertionError("the loader of the authors was called")


_rebuild.__module__, _rebuild.__qualname__ = (
    "torch_utils.persistence",
    "_reconstruct_persistent_obj",
)


class EasyDict(dict):
    """Their dict, which the data set's settings are in."""


EasyDict.__module__ = "dnnlib.util"


class Persistent(nn.Module):
    """A module that is written with the name and the source text of its class."""

    def __init__(self, class_name: str, source: str = "raise SystemExit('this text was run')"):
        super().__init__()
        self.described = {"class_name": class_name, "module_src": source}

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in vars(self).items() if k != "described"}
        return _rebuild, ({"type": "class", "version": 6, **self.described, "state": state},)


@contextlib.contextmanager
def _their_modules() -> Iterator[None]:
    """With modules of the authors' names, which pickle looks for when it writes."""
    persistence, util = (types.ModuleType(n) for n in ("torch_utils.persistence", "dnnlib.util"))
    persistence._reconstruct_persistent_obj, util.EasyDict = _rebuild, EasyDict
    names = {
        "torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util,
    }  # fmt: skip
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


BUFFERS = ("freqs", "resample_filter", "u")


def tree(class_name: str, arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> Persistent:
    """Returns nested modules with these tensors."""
    root = Persistent(class_name)
    root._init_args, root._init_kwargs = (), dict(arguments)
    for key, tensor in state.items():
        *path, name = key.split(".")
        module: nn.Module = root
        for part in path:
            if part not in module._modules:
                kind = nn.ModuleDict() if part in ("enc", "dec") else Persistent("Block")
                if isinstance(kind, Persistent):
                    kind.skip_scale = np.float64(0.5) ** 0.5
                module.add_module(part, kind)
            module = module._modules[part]
        if name in BUFFERS:
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, nn.Parameter(tensor))
    return root


def dumps(contents: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> bytes:
    """Pickles what a file is to hold."""
    with _their_modules():
        return pickle.dumps(contents, protocol)
