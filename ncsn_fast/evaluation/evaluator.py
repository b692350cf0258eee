"""Evaluation of samples against a reference, as in `evaluate --extractor`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.data import datasets
from ncsn_fast.data.formats import folder, recognise, split_of
from ncsn_fast.data.formats.numpy_file import holds_images
from ncsn_fast.data.images import to_uint8
from ncsn_fast.data.kept import keep
from ncsn_fast.data.listing import find_images
from ncsn_fast.evaluation.features import Extractor, sha256
from ncsn_fast.evaluation.fidelity import Fidelity
from ncsn_fast.evaluation.statistics_file import load_statistics, save_statistics
from ncsn_fast.models.score import ScoreModel

log = logging.getLogger(__name__)
BATCH = 256  # images read at once
DIGESTED = 64  # images whose digest identifies a source


def open_source(
    source: str,
    model: ScoreModel,
    background: str = "white",
    *,
    skip_damaged: bool = False,
    progress: bool = False,
) -> datasets.Images:
    """Opens images at the model's size; skip_damaged reads all, and leaves damaged ones out."""
    channels, height, width = model.image_shape
    if height != width:
        raise ValueError(f"images are read as squares; this model works on {height}x{width} pixels")
    images = datasets.open_images(source, size=height, channels=channels, background=background)
    if not skip_damaged:
        return images
    return keep(images, model.image_shape, skip_damaged=True, progress=progress)


def describe_source(source: str, images: datasets.Images) -> dict[str, Any]:
    """Returns a description, for JSON, that identifies a source without reading all images.

    data: its name; for files, the absolute path.   images: their number.   images_sha256: digest of
    the pixels of at most 64 images, evenly spread from first to last, and of the names and sizes of
    all files of a folder.
    """
    n, found = len(images), hashlib.sha256()
    path, split = split_of(source)
    digested = sorted({round(k * (n - 1) / (DIGESTED - 1)) for k in range(DIGESTED)})
    for image in datasets.read(images, digested):
        found.update(image.numpy().tobytes())
    if not datasets.is_named(source) and recognise(path) is folder.FORMAT:
        paths, _ = find_images(path)
        files = [(p.relative_to(path).as_posix(), p.stat().st_size) for p in paths]
        found.update(json.dumps(files).encode())
    if path.exists() and not datasets.is_named(source):
        source = ":".join(filter(None, (str(path.resolve()), split)))
    return {"data": source, "images": n, "images_sha256": found.hexdigest()}


def batches(images: datasets.Images, what: str, *, progress: bool) -> Iterator[Tensor]:
    """Yields all images as uint8 (B, C, H, W), with a progress bar."""
    with tqdm(total=len(images), desc=what, unit="image", disable=not progress) as bar:
        for first in range(0, len(images), BATCH):
            batch = datasets.stack(images, list(range(first, min(first + BATCH, len(images)))))
            yield batch
            bar.update(len(batch))


def is_statistics(source: str) -> bool:
    """Whether a reference is an .npz file of mu and sigma, and no images."""
    path = Path(source).expanduser()
    return path.suffix == ".npz" and not holds_images(path)


class Evaluator:
    """Evaluator of samples: computes the reference's statistics first, then adds samples.

    Args:
        source: images (open_source), or an .npz file of mu and sigma and no images; None for
            the held-out digits, which only the digits' extractor accepts.
        n: number of samples that will be added.
        save: where to write mu and sigma of the reference.
        background: colour below the transparent pixels of the reference.
        skip_damaged: leave images of the reference out that cannot be read.

    Attributes:
        reference: description of the reference, for JSON.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: str | None,
        model: ScoreModel,
        n: int,
        *,
        seed: int = 0,
        save: Path | None = None,
        background: str = "white",
        skip_damaged: bool = False,
        progress: bool = True,
    ) -> None:
        if source is None:
            if extractor.name != "digits":
                raise ValueError("--extractor needs a --reference: images, or an .npz file")
            source = "digits:held-out"
        path = Path(source).expanduser()
        if is_statistics(source):
            if save is not None:
                raise ValueError("--save-reference needs images as --reference, not an .npz file")
            statistics = load_statistics(path, extractor)
            self.reference = {"source": source, "n": statistics.n or None, "sha256": sha256(path)}
            self.fidelity = Fidelity(extractor, n, None, seed=seed)
            self.fidelity.use_references(statistics)
            return
        images = keep(
            open_source(source, model, background),
            model.image_shape,
            skip_damaged=skip_damaged,
            progress=progress,
        )
        if len(images) < 2:
            raise ValueError(f"a reference needs at least 2 images; {source} has {len(images)}")
        self.reference = {"source": source, "n": len(images)}
        self.fidelity = Fidelity(extractor, n, len(images), seed=seed)
        for batch in batches(images, "reference", progress=progress):
            self.fidelity.add(batch, real=True)
        if save is not None:
            save_statistics(save, self.fidelity.statistics(real=True), extractor)

    def add(self, images: Tensor) -> None:
        """Adds samples (B, C, H, W) in [0, 1], quantised as in PNG files."""
        levels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
        self.fidelity.add(levels, real=False)

    def figures(self) -> dict[str, Any]:
        """Returns figures, extractor and reference for JSON, and logs the first figure."""
        figures, extractor = self.fidelity.figures(), self.fidelity.extractor
        name = "fid" if "fid" in figures else "frechet_distance"
        log.info(
            "%s %.4g (%d samples, reference %s, extractor %s, sha256 %s)%s",
            "FID" if name == "fid" else "Fréchet distance", figures[name], figures["n"],
            self.reference["source"], extractor.name, extractor.sha256,
            f": {figures['note']}" if "note" in figures else "",
        )  # fmt: skip
        return {
            "figures": figures,
            "extractor": extractor.describe(),
            "reference": self.reference,
        }
