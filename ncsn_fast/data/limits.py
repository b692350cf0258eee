"""Bounds on what files may declare, checked before memory is given to them.

A file of a hundred bytes can declare gigabytes. Every bound has a row in LIMITS, is stated in
SECURITY.md, and is raised by the environment variable of its name, which commands, worker processes
and Python callers share:

    NCSN_FAST_MAX_PIXELS=500000000 python -m ncsn_fast.train --data scans/
"""

from __future__ import annotations

import dataclasses
import os
import re


@dataclasses.dataclass(frozen=True)
class Limit:
    """A bound.

    Attributes:
        variable: environment variable that replaces the default.
        default: the bound without it.
        unit: of the bound, "bytes" or a plural noun.
        about: the quantity that is bounded, for SECURITY.md.
    """

    variable: str
    default: int
    unit: str
    about: str

    def value(self) -> int:
        """The bound in force; ValueError if the environment holds no number."""
        given = os.environ.get(self.variable)
        if not given:
            return self.default
        if self.unit == "bytes":
            return parse_size(given, self.variable)
        if not re.fullmatch(r"\s*\d{1,18}\s*", given):
            raise ValueError(
                f"{self.variable} must be a number of {self.unit} such as {self.default}; "
                f"got {given!r}"
            )
        return int(given)

    def check(self, amount: int, subject: str, error: type[Exception] = ValueError) -> None:
        """Raises `error` if `amount`, which `subject` declares, is more than the bound."""
        most = self.value()
        if amount > most:
            raise error(
                f"{subject} declares {amount:,} {self.unit}, and at most {most:,} are read; "
                f"if you trust it, set the environment variable {self.variable}={amount}"
            )


PIXELS = Limit(
    "NCSN_FAST_MAX_PIXELS",
    2**28 // 3,  # where Pillow begins to warn: a quarter of a GiB as RGB
    "pixels",
    "pixels of one image (width x height)",
)
IMAGE_BYTES = Limit(
    "NCSN_FAST_MAX_IMAGE_BYTES",
    2**29,  # as many pixels, uncompressed, with 16 bits a channel
    "bytes",
    "size of one image file; of a zip's entry, uncompressed",
)

LIMITS = (PIXELS, IMAGE_BYTES)


def parse_size(text: str, name: str) -> int:
    """Parses "5GB", "512 MiB" or "1000000" as bytes.

    Raises:
        ValueError: not a size; the message contains `name`.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{name} must be a size such as 5GB, 512MiB or 1000000; got {text!r}")
    number, letter, binary = match.groups()
    power = " kmgt".index(letter.lower()) if letter else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def size_text(size: int) -> str:
    """Formats a number of bytes, in powers of 1000."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} B"
