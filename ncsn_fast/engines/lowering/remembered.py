"""A network's derived values, kept as long as its parameters are as they were."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Remembered(NamedTuple, Generic[T]):
    """A value, and the tensors that it was made of, with their versions."""

    value: T
    seen: list[tuple[weakref.ref[Tensor], int]]

    @classmethod
    def of(cls, value: T, tensors: Sequence[Tensor]) -> Remembered[T]:
        return cls(value, [(weakref.ref(p), _version(p)) for p in tensors])

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was made of these, as they are now."""
        pairs = zip(self.seen, tensors, strict=False)
        same = all(ref() is p and version == _version(p) for (ref, version), p in pairs)
        return same and len(self.seen) == len(tensors)


def tensors_of(net: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters and buffers of a network."""
    yield from net.parameters()
    yield from net.buffers()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
