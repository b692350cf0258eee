"""Output paths of commands, checked before the work starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ncsn_fast.models.score import ScoreModel


def check_output(option: str, path: Path | None) -> None:
    """Raises OSError unless a file of this path can be written, as far as can be known before.

    Args:
        option: name of the option, for messages.
        path: None for an option that was not given.
    """
    if path is None:
        return
    if path.is_dir():
        raise OSError(f"cannot write {option} {path}: it is a folder; name a file in it")
    _check_place(option, path, path.absolute().parent, path.name)


def check_output_folder(option: str, folder: Path | None) -> None:
    """Raises OSError unless files can be written into a folder, which need not exist."""
    if folder is not None:
        _check_place(option, folder, folder.absolute(), "settings.json")


def _check_place(option: str, path: Path, folder: Path, name: str) -> None:
    """Tries a temporary file in the folder, or in the nearest one above it that exists."""
    cannot = f"cannot write {option} {path}"
    there = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), Path("/"))
    if not there.is_dir():
        raise OSError(f"{cannot}: {there} is not a folder; choose another place")
    try:
        handle, tried = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=there)
        os.close(handle)
        os.unlink(tried)
    except OSError as error:
        raise OSError(
            f"{cannot}: {there} takes no file ({error.strerror or error}); choose another place"
        ) from error


def check_pictures(model: ScoreModel) -> None:
    """Raises ValueError unless PNG files can hold the images of a model."""
    channels = model.image_shape[0]
    if channels not in (1, 3):
        raise ValueError(
            f"this model's images have {channels} channels, and pictures are grey or RGB: draw "
            "with ncsn_fast.Sampler(...).sample() in Python, and select 1 or 3 of them"
        )
