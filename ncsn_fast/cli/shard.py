"""Part I/K of a sampling request: which samples one of K processes draws."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` (0 .. count-1) of a request that is drawn in `count` parts."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def block(self, n: int, size: int) -> range:
        """Returns the positions among n samples of this part, in whole micro-batches of `size`.

        Parts differ by one micro-batch at most, the first ones being larger; only the last
        micro-batch of the request can be incomplete.
        """
        each, more = divmod(-(-n // size), self.count)
        first = self.index * each + min(self.index, more)
        stop = first + each + (self.index < more)
        return range(min(n, first * size), min(n, stop * size))


def parse(text: str) -> Shard:
    """Parses "i/k" as a Shard.

    Raises:
        ValueError: not 0 <= i < k.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None:
        raise ValueError(f"--shard must be I/K, as in 0/8 for the first of eight; got {text!r}")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        parts = f"0/{count} to {count - 1}/{count}" if count else "of at least one"
        raise ValueError(f"--shard counts from 0: parts are {parts}; got {text!r}")
    return Shard(index, count)
