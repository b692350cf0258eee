"""Which files of a folder or zip are pictures, and which are left out, and why."""

from __future__ import annotations

import collections
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath

from ncsn_fast.data.decode import SUFFIXES, DataError, printable


class LeftOut:
    """Files that were not taken: how many for each reason, and the first of them."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, reason: str, name: str) -> None:
        self._first.setdefault(reason, printable(name))
        self._counts[reason] += 1

    def __str__(self) -> str:
        """Such as "2 hidden (._a.png, ...), 1 of another kind (notes.txt)"; or "none"."""
        parts = [
            f"{n} {reason} ({self._first[reason]}{', ...' if n > 1 else ''})"
            for reason, n in sorted(self._counts.items())
        ]
        return ", ".join(parts) or "none"


def list_folder(folder: Path) -> tuple[list[Path], LeftOut]:
    """Picture files below a folder, in any depth, in the order of their names.

    Links are followed, and every folder is read once, whatever leads to it. What begins with a dot
    and `__MACOSX` is left out.
    """
    found: list[Path] = []
    left, seen = LeftOut(), set[tuple[int, int]]()
    folders, links = [folder], list[Path]()
    while folders or links:
        place = folders.pop() if folders else links.pop()  # a link gives way to the folder itself
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                left.add("links to folders that are taken already", _relative(folder, place))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                rows = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot read the folder {place}: {error.strerror}") from error
        below: list[Path] = []
        for entry in rows:
            path = place / entry.name
            # Of a link the path is asked, because entry.is_dir() raises for links in a circle; of
            # others the entry, which costs no system call.
            if linked := entry.is_symlink():
                is_folder, is_file = path.is_dir(), path.is_file()
            else:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            if reason := _unwanted(entry.name):
                left.add(reason, _relative(folder, path))
            elif is_folder:
                (links if linked else below).append(path)
            elif path.suffix.lower() not in SUFFIXES:
                left.add("of another kind", _relative(folder, path))
            elif is_file:
                found.append(path)
            else:
                reason = "broken links" if linked else "that are no files"
                left.add(reason, _relative(folder, path))
        folders += reversed(below)
    return sorted(found), left


def list_zip(archive: zipfile.ZipFile) -> tuple[list[zipfile.ZipInfo], LeftOut]:
    """Picture files of an archive, in any depth, in the order of their names.

    Folders, links, and what list_folder leaves out are left out.
    """
    found: list[zipfile.ZipInfo] = []
    left = LeftOut()
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        reason = next(filter(None, map(_unwanted, path.parts)), None)
        if info.is_dir():
            continue
        if reason:
            left.add(reason, info.filename)
        elif path.suffix.lower() not in SUFFIXES:
            left.add("of another kind", info.filename)
        elif stat.S_ISLNK(info.external_attr >> 16):
            left.add("links", info.filename)
        else:
            found.append(info)
    return sorted(found, key=lambda info: info.filename), left


def _unwanted(name: str) -> str | None:
    """Why a file or folder of this name is left out, if it is."""
    if name == "__MACOSX":
        return "of macOS"
    return "hidden" if name.startswith(".") else None


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
