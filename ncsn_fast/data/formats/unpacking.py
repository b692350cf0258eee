"""Files that may be gzipped, read as they are unpacked."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ncsn_fast.data.files import open_regular
from ncsn_fast.data.limits import DATA_BYTES

Bytes = BinaryIO | gzip.GzipFile
GZIP_ERRORS = (OSError, EOFError, zlib.error)  # of a damaged file


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[Bytes]:
    """Opens a file for reading bytes, unpacked if it is gzipped."""
    with open_regular(path, DATA_BYTES) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.GzipFile(fileobj=file) if zipped else file as unpacked:
            yield unpacked
