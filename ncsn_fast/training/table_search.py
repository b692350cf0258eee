"""CMA-ES whose course is a JSON file: a search that is interrupted goes on where it was.

The file holds the candidates' losses in order. Candidates are a function of the seed and of the
losses before them, so that a search is resumed by asking again and telling what is known.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn_fast.data import limits
from ncsn_fast.data.files import atomic_write
from ncsn_fast.data.json_file import JSONError, read_json

Vector = NDArray[np.float64]
VERSION = 1
WORST = 1e9  # loss of a candidate that has none: its samples were not finite


def import_cma() -> Any:
    """Returns the package `cma`; ValueError that says how to get it if it is missing."""
    try:
        import cma
    except ImportError as error:
        raise ValueError(
            f"tune needs the `cma` package ({error}): pip install 'ncsn_fast[tune]'"
        ) from error
    return cma


@dataclasses.dataclass
class Journal:
    """Measurements of a search, in a file that is rewritten after every loss.

    Attributes:
        path: the file; None keeps it in memory.
        settings: what the losses depend on, for JSON.
        seconds: time spent so far, in all sittings.
        losses: of the candidates, in the order in which they were asked for.
        values: other measurements by name, such as those on held-out seeds.
    """

    path: Path | None
    settings: dict[str, Any]
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any]) -> Journal:
        """Reads a journal, or begins one.

        Raises:
            ValueError: the file is damaged, or of a search with other settings.
        """
        if path is None or not path.exists():
            return cls(path, settings)
        try:
            found = read_json(path, limit=limits.RECORD_BYTES)
        except (OSError, JSONError) as error:
            raise ValueError(f"{error}: choose another --state") from error
        there = found.get("settings")
        if found.get("version") != VERSION or not isinstance(there, dict):
            raise ValueError(f"{path} is no state of tune: choose another --state")
        changed = sorted(k for k, value in settings.items() if there.get(k, ...) != value)
        if changed or there.keys() != settings.keys():
            changed = changed or ["version of tune"]
            raise ValueError(
                f"{path} is of a search with another {', '.join(changed)}: choose another --state"
            )
        losses, values = found.get("losses"), found.get("values")
        seconds = found.get("seconds")
        if not (isinstance(losses, list) and isinstance(values, dict)) or not all(
            _are_numbers(part) for part in (losses, [seconds], *values.values())
        ):
            raise ValueError(f"{path} is damaged: choose another --state, or delete it")
        assert seconds is not None
        return cls(path, settings, float(seconds), losses, values)

    def save(self) -> None:
        """Writes the file."""
        if self.path is not None:
            with atomic_write(self.path) as temporary:
                values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
                del values["path"]
                temporary.write_text(json.dumps({"version": VERSION, **values}) + "\n")

    def value(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        """Returns a measurement, which is made and written if it is not there yet."""
        if name not in self.values:
            self.values[name] = measure()
            self.save()
        return self.values[name]


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) for v in values)


class Search:
    """Covariance matrix adaptation (CMA-ES, Hansen & Ostermeier 2001) with a journal.

    Args:
        start, spread, lowest, highest: (D,) first mean, its standard deviations, and the bounds.
        popsize: candidates of a generation.
    """

    def __init__(
        self,
        journal: Journal,
        start: Vector,
        *,
        spread: Vector,
        lowest: Vector,
        highest: Vector,
        popsize: int,
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        options = {
            "CMA_stds": spread, "bounds": [lowest.tolist(), highest.tolist()], "popsize": popsize,
            "seed": math.nan, "randn": lambda *shape: rng.standard_normal(shape), "verbose": -9,
        }  # fmt: skip
        self.journal, self.generation = journal, 0
        self._cma = import_cma().CMAEvolutionStrategy(start, 1.0, options)

    def step(self, loss: Callable[[Vector, int], float]) -> None:
        """Runs a generation: loss(candidate (D,), generation) of those that are not known yet."""
        candidates = self._cma.ask()
        done = self.generation * len(candidates)
        for k, candidate in enumerate(candidates):
            if done + k == len(self.journal.losses):
                found = loss(candidate, self.generation)
                self.journal.losses.append(found if math.isfinite(found) else WORST)
                self.journal.save()
        self._cma.tell(candidates, self.journal.losses[done : done + len(candidates)])
        self.generation += 1

    @property
    def mean(self) -> Vector:
        """Mean of the next candidates, (D,)."""
        return np.asarray(self._cma.result.xfavorite)

    @property
    def converged(self) -> bool:
        """Whether the search itself has nothing left to do."""
        return bool(self._cma.stop())
