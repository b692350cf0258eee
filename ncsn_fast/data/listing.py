"""Selection of the image files in a folder or zip."""

from __future__ import annotations

import collections
import logging
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath

from ncsn_fast.data.decode import SUFFIXES, DataError, printable

log = logging.getLogger(__name__)


class Skipped:
    """Counter of skipped files by reason, with the first file for each reason."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, reason: str, name: str) -> None:
        """Counts a file."""
        self._first.setdefault(reason, printable(name))
        self._counts[reason] += 1

    def __str__(self) -> str:
        """Returns text such as "hidden (2, such as ._a.png), not an image (1, notes.txt)"."""
        parts = [
            f"{reason} ({n}, {'such as ' if n > 1 else ''}{self._first[reason]})"
            for reason, n in sorted(self._counts.items())
        ]
        return ", ".join(parts) or "nothing"


def find_images(folder: Path) -> tuple[list[Path], Skipped]:
    """Finds the image files in a folder and its subfolders, sorted by name.

    Symbolic links are followed, and each folder is read once, however many links lead to it. Hidden
    files and folders and `__MACOSX` are skipped.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[Path] = []
    skipped, seen = Skipped(), set[tuple[int, int]]()
    folders, links = [folder], collections.deque[Path]()
    while folders or links:
        place = folders.pop() if folders else links.popleft()  # links last: the real folder is used
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                skipped.add("link to a folder already read", _relative(folder, place))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                rows = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot read the folder {place}: {error.strerror}") from error
        subfolders: list[Path] = []
        for entry in rows:
            path = place / entry.name
            # entry.is_dir() costs no system call, but raises for circular links.
            kind = path if (linked := entry.is_symlink()) else entry
            if reason := _ignored(entry.name):
                skipped.add(reason, _relative(folder, path))
            elif kind.is_dir():
                (links if linked else subfolders).append(path)
            elif path.suffix.lower() not in SUFFIXES:
                skipped.add("not an image", _relative(folder, path))
            elif kind.is_file():
                found.append(path)
            else:
                skipped.add("broken link" if linked else "not a file", _relative(folder, path))
        folders += reversed(subfolders)
    return sorted(found), skipped


def find_zip_images(archive: zipfile.ZipFile) -> tuple[list[zipfile.ZipInfo], Skipped]:
    """Finds the image files in an archive and its subfolders, sorted by name.

    Skips what `find_images` skips, and links.
    """
    found: list[zipfile.ZipInfo] = []
    skipped = Skipped()
    for info in archive.infolist():
        if info.is_dir():
            continue
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if reason := next(filter(None, map(_ignored, path.parts)), None):
            skipped.add(reason, info.filename)
        elif path.suffix.lower() not in SUFFIXES:
            skipped.add("not an image", info.filename)
        elif stat.S_ISLNK(info.external_attr >> 16):
            skipped.add("link", info.filename)
        else:
            found.append(info)
    return sorted(found, key=lambda info: info.filename), skipped


def report_count(source: str, names: list[str], skipped: Skipped) -> None:
    """Logs how many images were found and skipped; raises DataError if there are none."""
    if not names:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{source} holds no images ({kinds}, in any depth); skipped: {skipped}")
    log.info("%s: %d images; skipped: %s", source, len(names), skipped)


def _ignored(name: str) -> str | None:
    """Returns the reason if a file or folder is skipped because of its name."""
    if name == "__MACOSX":
        return "macOS metadata"
    return "hidden" if name.startswith(".") else None


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
