"""Races: what is to be compared runs interleaved, round by round, in one process.

Machines are shared and their speed drifts, so that two providers timed one after the other are not
comparable. Here all entrants of a group are built and verified first; then every round runs each
of them once, in an order that changes from round to round. Only ratios within a race mean anything.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

SHORTEST_LAP = 5e-3  # seconds; shorter calls are repeated, so that the clock does not count


class Absent(RuntimeError):
    """A provider that cannot run here; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A provider made ready.

    Attributes:
        run: what is timed.
        error: relative error against the reference, computed once before any timing.
        bound: the error that is allowed.
        info: what its result shall say about it.
    """

    run: Callable[[], Any]
    error: Callable[[], float]
    bound: float
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a race takes.

    Attributes:
        seconds: time for the rounds of a race; the fewest rounds are run even if it is exceeded.
        fewest, most: rounds.
        lead_in: calls shorter than this many seconds are preceded by one that is not timed. They
            then find their own data in the caches and their own threads awake, and the idle threads
            of the entrant before asleep; of longer calls all that is a negligible part.
    """

    seconds: float = 60.0
    fewest: int = 5
    most: int = 200
    lead_in: float = 0.5


@dataclasses.dataclass
class Result:
    """Of one provider: its laps in seconds, each of `iterations` calls, or why there are none."""

    laps: list[float] = dataclasses.field(default_factory=list)
    iterations: int = 1
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: Exception | None = None


def relative_error(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected| in the Euclidean norm; NaN where y holds one."""
    wanted = expected.double()
    return float((y.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: rotated by one every second round, and every odd one reversed.

    So all entrants have all places, and no entrant always follows the same one.
    """
    for k in range(rounds):
        shift = (k // 2) % max(len(names), 1)
        order = names[shift:] + names[:shift]
        yield order[::-1] if k % 2 else order


def race(
    builders: Mapping[str, Callable[[], Entrant]],
    pace: Pace,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Result]:
    """Builds and verifies every entrant, then times them interleaved.

    An entrant that cannot be built, or whose error exceeds its bound, is not timed: its result
    holds the exception, and the race goes on without it.
    """
    results = {name: Result() for name in builders}
    runs: dict[str, Callable[[], Any]] = {}
    for name, build in builders.items():
        try:
            runs[name] = _admit(name, build, results[name])
        except Exception as failure:
            results[name].failure = failure
    _run_rounds(runs, results, pace, clock)
    runs.clear()
    gc.collect()
    return results


def _admit(name: str, build: Callable[[], Entrant], result: Result) -> Callable[[], Any]:
    entrant = build()
    error = entrant.error()
    if not error <= entrant.bound:  # true for NaN
        raise AssertionError(
            f"{name} differs from the reference by {error:.2e} (allowed: {entrant.bound:.0e})"
        )
    result.info = {**entrant.info, "relative_error": error}
    return entrant.run


def _run_rounds(
    runs: dict[str, Callable[[], Any]],
    results: dict[str, Result],
    pace: Pace,
    clock: Callable[[], float],
) -> None:
    total, led = 0.0, set()
    for name, run in runs.items():
        seconds = _call_seconds(run, clock)
        results[name].iterations = _repeats(seconds)
        total += seconds * results[name].iterations
        if seconds < pace.lead_in:
            led.add(name)
            total += seconds
    rounds = min(pace.most, max(pace.fewest, int(pace.seconds / max(total, 1e-9))))
    for order in orders(list(runs), rounds):
        for name in order:
            if name in led:
                runs[name]()
            results[name].laps.append(_lap(runs[name], results[name].iterations, clock))


def _repeats(seconds: float) -> int:
    """Calls in a lap, if one takes so long."""
    return max(1, round(SHORTEST_LAP / max(seconds, 1e-9)))


def _call_seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """What a call takes once warm: short ones are tried again, since the first calls are slow."""
    seconds = _lap(run, 1, clock)
    for _ in range(2 * (seconds < 1)):
        n = _repeats(seconds)
        seconds = _lap(run, n, clock) / n
    return seconds


def _lap(run: Callable[[], Any], iterations: int, clock: Callable[[], float]) -> float:
    """Seconds that so many calls take."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = clock()
        for _ in range(iterations):
            run()
        return clock() - began
    finally:
        if collecting:
            gc.enable()


class Replay:
    """A clock for pytest-benchmark that goes by recorded laps, so that results are its own kind.

    pytest-benchmark reads its timer twice per round; every second reading is one lap later.
    """

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._readings = 0

    def __call__(self) -> float:
        k, ends = divmod(self._readings, 2)
        self._readings += 1
        return self.laps[k] if ends else 0.0

    def __str__(self) -> str:
        return "laps of an interleaved race"  # pytest-benchmark writes it into its JSON
