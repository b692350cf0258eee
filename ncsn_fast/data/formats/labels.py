"""Labels of image files: from a dataset.json, or from the names of their folders."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsn_fast.data.decode import DataError, printable
from ncsn_fast.data.formats.base import check_labels

log = logging.getLogger(__name__)
DATASET_JSON = "dataset.json"
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "extra"}

Labels = tuple[Tensor | None, tuple[str, ...]]


def find_labels(names: list[str], described: dict[str, Any] | None, where: str) -> Labels:
    """Returns the labels and classes of image files, and logs where they are from.

    A dataset.json decides, as in EDM: {"labels": [[name, class], ...]}, or null for none.
    Otherwise each folder is a class, in the order of their names, as in torchvision's ImageFolder.
    There are no labels if images lie outside of these folders, or all in one, or if the folders
    are splits (train, test, val).

    Args:
        names: paths with slashes, relative to the dataset.json.
    """
    if described is not None:
        labels, classes = _of_json(names, described, f"{where}: {DATASET_JSON}")
        origin = DATASET_JSON
    else:
        labels, classes = _of_folders(names)
        origin = "the names of its folders"
    if labels is not None:
        log.info("%s: labels of %d classes, from %s", where, len(classes), origin)
    return labels, classes


def _of_folders(names: list[str]) -> Labels:
    folders = [name.split("/")[:-1] for name in names]
    depth = 0  # of the folder that holds all images
    while len({tuple(parts[: depth + 1]) for parts in folders}) == 1 and len(folders[0]) > depth:
        depth += 1
    if any(len(parts) == depth for parts in folders):
        return None, ()
    chosen = [parts[depth] for parts in folders]
    classes = sorted(set(chosen))
    if {name.lower() for name in classes} <= _SPLITS:
        return None, ()
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in chosen]), tuple(map(printable, classes))


def _of_json(names: list[str], described: dict[str, Any], where: str) -> Labels:
    rows = described.get("labels")
    if rows is None:
        return None, ()
    try:
        known = {str(name).replace("\\", "/"): label for name, label in rows}
    except (TypeError, ValueError) as error:
        raise DataError(
            f'{where} must hold {{"labels": [[name, class], ...]}}; mend or remove it'
        ) from error
    lacking = [name for name in names if name not in known]
    if lacking:
        raise DataError(
            f"{where} has no label of {len(lacking)} of the {len(names)} images, such as "
            f"{printable(lacking[0])}; complete or remove it"
        )
    labels = [known[name] for name in names]
    if any(isinstance(label, list) for label in labels):
        log.warning("%s holds vectors, not classes; its labels are not used", where)
        return None, ()
    if not all(type(label) is int for label in labels):
        odd = next(label for label in labels if type(label) is not int)
        raise DataError(f"{where} has the label {odd!r:.40}, and labels must be integers")
    return check_labels(np.array(labels, np.int64), where)
