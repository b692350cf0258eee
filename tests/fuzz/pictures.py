"""Damaged images, and everything that reads images: `python tests/fuzz/pictures.py N`.

A seed makes one damaged file, the same on every machine with the same Pillow. Reading it either
works or ends in one line of ours that names the file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import random
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import mutations
import numpy as np
from PIL import Image

from ncsn_fast.cli.arguments import make_mask
from ncsn_fast.cli.sample_folder import read_files
from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import Transform
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.images import as_tensor, sample_path

MOST_PIXELS = 10**6  # lower than the package's, so that a run is about parsers, not memory
SIDE = 12


@functools.cache
def corpus() -> tuple[bytes, ...]:
    """Sound files: every format and mode that Pillow writes, with EXIF, alpha, frames; and zips."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    whole = Image.fromarray(noise)
    modes = [whole.convert(m) for m in ("RGBA", "RGB", "L", "LA", "1", "P", "CMYK", "YCbCr")]
    modes += [Image.fromarray(noise[..., 0].astype(np.uint16) * 257)]
    modes += [Image.fromarray(noise[..., 0].astype(np.int32)), Image.fromarray(noise[..., 0] / 255)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000", "AVIF", "QOI"):
        for image in modes:
            for options in ({}, {"exif": exif}, {"save_all": True, "append_images": [image] * 2},
                            {"transparency": 3}, {"compression": "tiff_lzw"}):  # fmt: skip
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    file = io.BytesIO()
                    image.save(file, kind, **options)
                    files.append(file.getvalue())
    files = list(dict.fromkeys(files))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for i, content in enumerate(files[::40]):
                archive.writestr(zipfile.ZipInfo(f"ä/{i}.png"), content, method)
        files += [file.getvalue()] * 6  # as a format of its own
    return tuple(files)


def mutate(seed: int) -> bytes:
    """A damaged file."""
    draw = random.Random(seed)
    content = bytearray(draw.choice(corpus()))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(CHANGES)(content, draw)
    if content[:4] == b"\x89PNG" and draw.random() < 0.7:
        _sign(content)
    return bytes(content)


def _splice(content: bytearray, draw: random.Random) -> None:
    other = draw.choice(corpus())
    content[mutations.place(content, draw) :] = other[draw.randrange(len(other)) :]


CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (*mutations.CHANGES, _splice)


def _sign(content: bytearray) -> None:
    """Corrects a PNG's checksums: decoders look no further where they are wrong."""
    place = 8
    while place + 12 <= len(content):
        end = place + 8 + struct.unpack_from(">I", content, place)[0]
        if end + 4 > len(content):
            return
        struct.pack_into(">I", content, end, zlib.crc32(content[place + 4 : end]))
        place = end + 4


def _readers(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that reads the images that lie in a folder, by name."""
    sample = sample_path(folder, 0)
    content = sample.read_bytes()
    yield "image", lambda: Transform(16, 3)(sample, sample.name)
    yield "entry", lambda: Transform(9, 1, centre_crop=7)(content, sample.name)
    yield "mask", lambda: make_mask(str(sample), SIDE, SIDE)
    yield "sample", lambda: list(read_files(folder, [0], (3, SIDE, SIDE)))
    with contextlib.suppress(Exception):  # opening is the caller's part
        image = Image.open(io.BytesIO(content))
        yield "caller", lambda: as_tensor(image, (3, SIDE, SIDE))
    if b"PK" in content:
        archive = folder / "000000.zip"
        archive.write_bytes(content)
        yield "zip", lambda: datasets.stack(datasets.open_images(archive, size=8, channels=3))


def check(content: bytes) -> dict[str, bool]:
    """Reads one file in every way; for each, whether it could be read.

    Raises:
        AssertionError: something else was raised than an error of ours, in one line.
    """
    found = {}
    with _quiet(), tempfile.TemporaryDirectory() as place:
        path = sample_path(Path(place), 0)
        path.parent.mkdir()
        path.write_bytes(content)
        for name, read in _readers(Path(place)):
            try:
                read()
            except Exception as error:
                if fault := _fault(error, named=name != "caller"):
                    raise AssertionError(f"{name}: {fault}") from error
                found[name] = False
            else:
                found[name] = True
    return found


def _fault(error: Exception, *, named: bool) -> str | None:
    """Returns the fault of an error: of another type, of several lines, or without a file name."""
    if type(error) not in (DataError, ValueError):  # subclasses such as UnicodeDecodeError
        return repr(error)
    text = str(error)
    if "\n" in text:
        return f"several lines: {error!r}"
    if "BytesIO" in text or (named and "000000." not in text):
        return f"no file name: {text}"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and log lines, and with a bound that keeps a run fast."""
    before = os.environ.get("NCSN_FAST_MAX_PIXELS")
    os.environ["NCSN_FAST_MAX_PIXELS"] = str(MOST_PIXELS)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        del os.environ["NCSN_FAST_MAX_PIXELS"]
        if before is not None:
            os.environ["NCSN_FAST_MAX_PIXELS"] = before


def run(n: int, first: int = 0) -> dict[str, Any]:
    """Checks the files of n seeds; how many were read, and the first failures."""
    return harness.run(mutate, check, n, first)


if __name__ == "__main__":
    result = run(*map(int, sys.argv[1:3]))
    print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")
    sys.exit(bool(result["failures"]))
