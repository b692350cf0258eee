"""Folders of results that grow: one PNG per sample, and a file with the settings of all.

A command that was killed can be repeated and computes only what is missing; a folder never mixes
results of two models, seeds or settings.
"""

from __future__ import annotations

import itertools
import json
import logging
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.cli.options import ClassOptions
from ncsn_fast.data import limits
from ncsn_fast.data.decode import DataError, WarnOnce, decode, pixels
from ncsn_fast.data.files import atomic_write, open_regular, remove_leftovers
from ncsn_fast.data.images import sample_path, save_png, to_uint8
from ncsn_fast.data.json_file import JSONError, read_json
from ncsn_fast.ops import noise
from ncsn_fast.sampler import Sampler

log = logging.getLogger(__name__)
SETTINGS_NAME = "settings.json"
SAMPLES = "samples drawn"
WINDOW = 2**16  # samples whose paths are in memory at once
# What an engine chooses by itself, and the options that choose it. Engines without the choice, and
# older versions, do not write "convolutions".
CHOICES = {"dtype": "--dtype", "convolutions": "--engine-options convolutions"}
OPTIONAL = frozenset({"convolutions"})
_PNG_BEGIN = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 13, b"IHDR")
_PNG_END = struct.pack(">I4sI", 0, b"IEND", 0xAE426082)


def claim_folder(
    folder: Path, settings: dict[str, Any], what: str, *, ignore: frozenset[str] = frozenset()
) -> None:
    """Writes the settings of a folder's results, or checks that existing ones agree.

    Args:
        settings: values for JSON; those of OPTIONAL may be missing in one of the two.
        what: the results, for messages, such as "samples drawn".
        ignore: settings that may differ.

    Raises:
        ValueError: the folder holds results with other settings.
    """
    path = folder / SETTINGS_NAME
    remove_leftovers(folder, {SETTINGS_NAME})
    if not path.exists():
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    there = read_settings(folder, what)  # another process may have been first
    named = [k for k in {**there, **settings} if k not in ignore]
    compared = [k for k in named if k not in OPTIONAL or (k in there and k in settings)]
    changed = [k for k in compared if there.get(k) != settings.get(k)]
    if changed:
        same = " ".join(f"{CHOICES[k]} {there[k]}" for k in changed if k in CHOICES and k in there)
        also = f", or give {same}" if set(changed) <= set(CHOICES) and same else ""
        raise ValueError(
            f"{folder} holds {what} with another {', '.join(changed)} ({path}); "
            f"take a new --out-dir{also}"
        )


def read_settings(folder: Path, what: str = SAMPLES) -> dict[str, Any]:
    """Returns what a folder's results are made with, as claim_folder wrote it."""
    path = folder / SETTINGS_NAME
    try:
        return read_json(path, finite=False)  # an option may be infinite
    except JSONError as error:
        raise ValueError(
            f"{path} does not say what the {what} there are made with ({error}); take a new "
            "--out-dir (or delete that file, if you know that this command made them)"
        ) from error


def write_files(
    sampler: Sampler, options: ClassOptions, folder: Path, block: range
) -> tuple[int, int]:
    """Draws the samples of a block whose files are missing or incomplete, one PNG each.

    The files are looked at as the samples are drawn, WINDOW missing ones at a time: a request of
    2^32 samples takes no more memory than one of WINDOW.

    Returns:
        Numbers of files written and of files that existed.
    """
    indices = noise.sample_range(options.start + block.start, len(block))
    windows = _missing(folder, indices, sampler.model.image_shape)
    first = next(windows, [])
    choices: dict[str, str] = {}
    if first or not (folder / SETTINGS_NAME).exists():
        # Only an engine that was built knows whether the model needs a slower variant.
        engine = sampler.engine_for(max(1, len(first)))
        choices = {"dtype": engine.dtype, **engine.choices}
    settings = {
        "model": sampler.model.digest(),
        **choices,
        "seed": options.seed,
        **options.method_options(),
        **options.class_options(),
    }
    if options.method == "fast" and sampler.model.tuned is not None:
        settings["table"] = sampler.model.tuned.digest()
    claim_folder(folder, settings, SAMPLES, ignore=frozenset(() if choices else CHOICES))
    written = 0
    for missing in itertools.chain([first] if first else [], windows):
        _draw(sampler, options, folder, missing)
        written += len(missing)
    return written, len(indices) - written


def _missing(folder: Path, indices: range, shape: tuple[int, int, int]) -> Iterator[list[int]]:
    """Yields the indices whose files are missing or incomplete, in lists of at most WINDOW."""
    lost = (i for i in indices if not is_whole(sample_path(folder, i), shape))
    while window := list(itertools.islice(lost, WINDOW)):
        yield window


def _draw(sampler: Sampler, options: ClassOptions, folder: Path, missing: list[int]) -> None:
    """Draws samples and writes their files."""
    paths = [sample_path(folder, i) for i in missing]
    if broken := sum(path.exists() for path in paths):
        log.warning("drawn again, as incomplete or of another size: %d of %s", broken, folder)
    for place in {path.parent for path in paths}:
        remove_leftovers(place)
    stream = sampler.stream(
        torch.tensor(missing, dtype=torch.int64),
        seed=options.seed,
        progress=not options.quiet,
        **options.method_options(),
        **options.classes(missing),
    )
    for part, images in stream:
        for index, array in zip(part.tolist(), to_uint8(images), strict=True):
            save_png(array, sample_path(folder, index))


def is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether a file begins and ends as the PNG of an image (C, H, W) does.

    It is read at both ends only; a crash of the machine leaves none, or zeros.
    """
    channels, height, width = shape
    header = struct.pack(">IIBB", width, height, 8, 0 if channels == 1 else 2)
    try:
        with open_regular(path, limits.IMAGE_BYTES) as file:
            begin = file.read(len(_PNG_BEGIN) + len(header))
            file.seek(-len(_PNG_END), 2)
            return begin == _PNG_BEGIN + header and file.read() == _PNG_END
    except OSError:
        return False


def read_files(
    folder: Path, indices: Sequence[int], shape: tuple[int, int, int], size: int = 256
) -> Iterator[Tensor]:
    """Reads samples of a folder by index, in batches (at most `size`, C, H, W) in [0, 1]."""
    for first in range(0, len(indices), size):
        paths = [sample_path(folder, i) for i in indices[first : first + size]]
        yield torch.stack([_read(path, shape) for path in paths]).to(torch.float32) / 255


def _read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One sample, uint8 (C, H, W).

    Raises:
        FileNotFoundError: it is missing.
        DataError: the file is damaged, or something else than such a sample.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, though all samples are drawn: --out needs an --out-dir that all "
            "ranks share; gather the files there, then repeat the command"
        )
    remedy = "Delete it, and repeat the command: it is drawn again."
    image = decode(path, shape[0], name=str(path), warn=WarnOnce(), remedy=remedy)
    if image.size != (shape[2], shape[1]):
        raise DataError(
            f"{path} is no sample of this model: it has {image.width}x{image.height} pixels, and "
            f"samples {shape[2]}x{shape[1]}. {remedy}"
        )
    return pixels(image)
