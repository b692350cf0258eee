"""Models of which only the shapes matter, because weights of a file follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM = (Tensor.normal_, Tensor.uniform_)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Makes modules that are built within on the meta device: parameters have shapes, no memory."""
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Skips the initialisation of parameters.

    Without memory it has no effect, but for an import of a second: torch implements `normal_` for
    the meta device in Python, by what torch.compile consists of.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _RANDOM or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)
