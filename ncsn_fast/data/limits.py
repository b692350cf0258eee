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
DATA_BYTES = Limit(
    "NCSN_FAST_MAX_DATA_BYTES",
    2**34,
    "bytes",
    "size of a data set in one file (IDX), uncompressed, and of its images as read",
)
LABELS_BYTES = Limit(
    "NCSN_FAST_MAX_LABELS_BYTES", 2**28, "bytes", "size of the labels of a data set (dataset.json)"
)
JSON_BYTES = Limit(
    "NCSN_FAST_MAX_JSON_BYTES", 2**20, "bytes", "size of a JSON file (config.json, settings.json)"
)
RECORD_BYTES = Limit(
    "NCSN_FAST_MAX_RECORD_BYTES", 2**30, "bytes", "size of a record of likelihoods (bits.jsonl)"
)
WEIGHTS_BYTES = Limit(
    "NCSN_FAST_MAX_WEIGHTS_BYTES", 2**34, "bytes", "size of a file of weights or checkpoint"
)
HEADER_BYTES = Limit("NCSN_FAST_MAX_HEADER_BYTES", 2**24, "bytes", "header of a .safetensors file")
IMAGE_SIZE = Limit(
    "NCSN_FAST_MAX_IMAGE_SIZE", 4096, "pixels", "height and width of a model's images"
)
WIDTH = Limit("NCSN_FAST_MAX_WIDTH", 2**16, "channels", "a model's channels and ngf")
BLOCKS = Limit("NCSN_FAST_MAX_BLOCKS", 1000, "blocks", "blocks of a U-Net")
STEPS = Limit(
    "NCSN_FAST_MAX_STEPS", 10**6, "steps", "Langevin steps of a model (n_sigmas x n_steps_each)"
)
BATCH_ELEMENTS = Limit(
    "NCSN_FAST_MAX_BATCH_ELEMENTS", 2**28, "elements", "N x C x H x W that an ONNX file is fixed to"
)

LIMITS = (
    PIXELS,
    IMAGE_BYTES,
    DATA_BYTES,
    LABELS_BYTES,
    JSON_BYTES,
    RECORD_BYTES,
    WEIGHTS_BYTES,
    HEADER_BYTES,
    IMAGE_SIZE,
    WIDTH,
    BLOCKS,
    STEPS,
    BATCH_ELEMENTS,
)


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
