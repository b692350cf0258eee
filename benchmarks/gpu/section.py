"""Section of the GPU benchmarks: device, sizes, deadline, and its record on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from race import Absent, Entrant, Pace, Result, race

from gpu import timing

Builders = Mapping[str, Callable[[], Entrant]]
OURS = ("ours", "triton", "cuda")  # prefixes of the names of this package's providers


class Section:
    """Benchmarks of one process.

    The record is written before and after every race, so that a killed process leaves its
    measurements and the list of pending providers.

    Args:
        small: tiny sizes and two rounds, for a rehearsal.
        seconds: no provider is built after this time.
    """

    def __init__(
        self, name: str, device: torch.device, path: Path, *, small: bool, seconds: float
    ) -> None:
        self.device, self.small, self._path = device, small, path
        self._ends = time.monotonic() + seconds
        self.record: dict[str, Any] = {"section": name, "groups": [], "not_run": [], "pending": []}

    def plan(self, groups: Iterable[tuple[str, Iterable[str]]]) -> None:
        """Announces groups and their providers; those not reached stay pending."""
        self.record["pending"] = [
            {"group": group, "provider": provider} for group, names in groups for provider in names
        ]
        self.save()

    def race(self, title: str, builders: Builders, *, seconds: float, **facts: Any) -> None:
        """Races the providers of a group and records them, with facts about their work.

        Results are seconds per call; an entrant's info may say how many `calls` its run makes.
        """
        pace = Pace(seconds=0, fewest=2, most=2) if self.small else Pace(seconds=seconds, fewest=5)
        guarded = {name: self._guarded(build) for name, build in builders.items()}
        results = race(guarded, pace)
        group: dict[str, Any] = {"group": title, "facts": facts, "results": {}}
        for name, result in results.items():
            if result.failure is None:
                group["results"][name] = _statistics(result)
            else:
                self._not_run(title, name, result.failure)
        if group["results"]:
            self.record["groups"].append(group)
        self.record["pending"] = [p for p in self.record["pending"] if p["group"] != title]
        self.save()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _guarded(self, build: Callable[[], Entrant]) -> Callable[[], Entrant]:
        def guarded() -> Entrant:
            if time.monotonic() > self._ends:
                raise Absent("the section's time was over")
            return build()

        return guarded

    def _not_run(self, group: str, provider: str, failure: Exception) -> None:
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        absent = isinstance(failure, Absent)
        self.record["not_run"].append({
            "group": group,
            "provider": provider,
            "reason": lines[0] if absent else f"{type(failure).__name__}: {lines[0]}",
            "failed": provider.startswith(OURS) and not absent,
        })  # fmt: skip

    @property
    def failed(self) -> bool:
        """Returns whether one of this package's providers is wrong or fails, rather than absent."""
        return any(row["failed"] for row in self.record["not_run"])

    def lap_of(self, calls: Any) -> tuple[timing.Call, int]:
        return timing.lap_of(calls, self.device, 1e-6 if self.small else timing.LAP)

    def save(self) -> None:
        """Writes the record atomically."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.record, indent=1))
        os.replace(new, self._path)


def _statistics(result: Result) -> dict[str, Any]:
    info = dict(result.info)
    calls = result.iterations * info.pop("calls", 1)
    q1, median, q3 = np.quantile(result.laps, [0.25, 0.5, 0.75]) / calls
    return {
        "median": float(median), "q1": float(q1), "q3": float(q3),
        "min": min(result.laps) / calls, "rounds": len(result.laps), "calls": calls, "info": info,
    }  # fmt: skip
