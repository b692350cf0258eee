"""Races: interleaved timing of the compared providers, round by round, in one process.

Machines are shared and their speed drifts, so timing two providers one after the other does not
compare them. Here all entrants of a group are built and verified first; then every round runs each
of them once, in an order that changes from round to round. Only ratios within a race are
meaningful.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

SHORTEST_LAP = 5e-3  # seconds; shorter calls are repeated, to hide the timer's overhead


class Absent(RuntimeError):
    """Error for a provider that cannot run here; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Entrant:
    """Provider that is ready to run.

    Attributes:
        run: the timed call.
        error: relative error against the reference, computed once before any timing.
        bound: the allowed error.
        info: facts to store with its result.
    """

    run: Callable[[], Any]
    error: Callable[[], float]
    bound: float
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pace:
    """Duration of a race.

    Attributes:
        seconds: time for the rounds of a race; the fewest rounds are run even if it is exceeded.
        fewest, most: rounds.
        lead_in: calls shorter than this many seconds are preceded by an untimed call, so that their
            data is in cache, their threads are awake and those of the previous entrant are idle;
            for longer calls these effects are negligible.
    """

    seconds: float = 60.0
    fewest: int = 5
    most: int = 200
    lead_in: float = 0.5


@dataclasses.dataclass
class Result:
    """Result of a provider: laps in seconds, of `iterations` calls each, or why there are none."""

    laps: list[float] = dataclasses.field(default_factory=list)
    iterations: int = 1
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: Exception | None = None


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Computes |y - expected| / |expected| in the Euclidean norm; NaN if y holds a NaN."""
    wanted = expected.double()
    return float((y.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Yields the order of each round: rotated every second round, reversed in odd rounds.

    So every entrant runs at every position, and no entrant always follows the same one.
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
    """Returns the number of calls per lap for calls of this duration."""
    return max(1, round(SHORTEST_LAP / max(seconds, 1e-9)))


def _call_seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Measures a warm call; short calls are repeated, since the first ones are slow."""
    seconds = _lap(run, 1, clock)
    for _ in range(2 * (seconds < 1)):
        n = _repeats(seconds)
        seconds = _lap(run, n, clock) / n
    return seconds


def _lap(run: Callable[[], Any], iterations: int, clock: Callable[[], float]) -> float:
    """Times this many calls, in seconds."""
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
    """Timer for pytest-benchmark that replays recorded laps, so that results have its usual form.

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
