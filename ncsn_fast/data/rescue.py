"""Results that outlive a failed write: they go to a temporary folder, which the error names."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_or_keep(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a result that took long to compute; `write` is given the path.

    Raises:
        OSError: writing failed; the message names the file elsewhere that holds the result, if it
            could be written there.
    """
    try:
        write(path)
    except OSError as error:
        kept = _keep(path.name, write)
        if kept is None:
            raise
        raise OSError(f"{error} The result is not lost: it is in {kept}; move it.") from error


def _keep(name: str, write: Callable[[Path], object]) -> Path | None:
    """Writes a file of that name into a new temporary folder; None if no place takes it."""
    for place in (None, os.curdir):  # None: the system's temporary folder
        folder: Path | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="ncsn_fast-", dir=place)).absolute()
            write(folder / name)
            return folder / name
        except OSError:
            if folder is not None:
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder)
    return None
