"""Data sets of Hugging Face's library `datasets`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.data.decode import REMEDY, DataError, WarnOnce, printable
from ncsn_fast.data.transform import Transform

log = logging.getLogger(__name__)


class HubImages:
    """Image column of a Hugging Face data set (`datasets`), by name or local path."""

    def __init__(self, name: str, split: str, transform: Transform) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "hf: data needs the `datasets` package: pip install 'ncsn_fast[data]'"
            ) from error
        try:
            rows: Any = datasets.load_dataset(name, split=split)
        except (
            Exception
        ) as error:  # the library raises a dozen kinds; each becomes one line with its cause
            raise DataError(
                f"cannot load hf:{name} (split {split}): {type(error).__name__}: {error}"
            ) from error
        columns = [k for k, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise DataError(
                f"hf:{name} has no image column; its columns are {', '.join(rows.features)}"
            )
        self.name, self.column, self.transform = name, columns[0], transform
        self.labels, self.classes = _labels(name, rows)
        self.warn = WarnOnce()
        # Bytes, because the library would decode images without limits.
        self.rows = rows.select_columns(self.column).cast_column(
            self.column, datasets.Image(decode=False)
        )
        self._decode = datasets.Image().decode_example

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        where = f"hf:{self.name}[{index}]"
        try:
            row = self.rows[int(index)][self.column]
            path = Path(row["path"] or "")
            # Paths inside archives and remote ones are opened by the library.
            source = row["bytes"] or (path if path.is_file() else self._decode(row))
        except Exception as error:  # a missing image, a network error: any kind
            reason = printable(str(error) or type(error).__name__)
            raise DataError(f"cannot read {where}: {reason}. {REMEDY}") from error
        return self.transform(source, where, self.warn)


def _labels(name: str, rows: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    """Returns the first ClassLabel column, and its names; None if a row has no label (-1)."""
    import datasets

    columns = [k for k, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not columns:
        return None, ()
    column = columns[0]
    values = [-1 if value is None else value for value in rows[column]]
    labels, classes = torch.tensor(values, dtype=torch.int64), tuple(rows.features[column].names)
    if len(labels) and int(labels.min()) < 0:
        log.info("hf:%s: the column %s lacks labels of some rows, and is not used", name, column)
        return None, ()
    log.info("hf:%s: labels of %d classes, in the column %s", name, len(classes), column)
    return labels, classes
