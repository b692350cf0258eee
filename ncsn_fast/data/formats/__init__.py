"""Formats of data sets, one module each, in the order in which a path is compared with them."""

from __future__ import annotations

from pathlib import Path

from ncsn_fast.data.formats import cifar, folder, idx, lsun, numpy_file, zip_archive
from ncsn_fast.data.formats.base import Format

# folder.FORMAT takes any folder, and comes last.
FORMATS: tuple[Format, ...] = (
    idx.FORMAT,
    cifar.FORMAT,
    lsun.FORMAT,
    numpy_file.FORMAT,
    zip_archive.FORMAT,
    folder.FORMAT,
)


def recognise(path: Path) -> Format | None:
    """Returns the first format that a file or folder is of, or None."""
    return next((each for each in FORMATS if each.recognises(path)), None)


def split_of(source: str) -> tuple[Path, str]:
    """Parses PATH[:SPLIT]; a path that exists may contain colons itself."""
    path = Path(source).expanduser()
    before, colon, split = source.rpartition(":")
    if colon and before and not path.exists():
        return Path(before).expanduser(), split
    return path, ""
