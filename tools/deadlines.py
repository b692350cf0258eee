"""Commands with deadlines: each runs in its own process group and always has an outcome."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
SHORTEST = 3.0  # seconds; a step with less time left is not started
OK, ABSENT, FAILED, LATE = "ok", "not run", "failed", "out of time"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a step; status is OK, ABSENT (with the reason), FAILED or LATE."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def by_exit_code(code: int, output: str) -> tuple[str, str]:
    """Returns status and reason of a command whose exit code says whether it worked."""
    return (OK, "") if code == 0 else (FAILED, last_line(output) or f"exit code {code}")


@dataclasses.dataclass(frozen=True)
class Step:
    """Command of a session.

    Attributes:
        command: arguments, or a function that is called when the step starts, with the seconds it
            will have; it may return a reason (str) for having nothing to run.
        seconds: its deadline.   judge: (exit code, output) -> status and reason.
    """

    name: str
    command: Callable[[float], Sequence[str] | str]
    seconds: float
    judge: Callable[[int, str], tuple[str, str]] = by_exit_code


def last_line(output: str) -> str:
    """Returns the last non-empty line, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else ""


class Runner:
    """Executor of steps that keeps their outcomes and output.

    Args:
        ends: time.monotonic() at which the session ends.
        log: receives the whole output of each step, one after another.
    """

    def __init__(self, ends: float, log: Path, cwd: Path, environment: Mapping[str, str]) -> None:
        self.ends, self.outcomes = ends, list[Outcome]()
        self.environment = dict(environment)
        self._log, self._cwd = log, cwd
        self._running = set[subprocess.Popen[bytes]]()
        log.write_text("")

    def left(self) -> float:
        return self.ends - time.monotonic()

    def stage(self, steps: Sequence[Step], *, workers: int, reserve: float = 0.0) -> None:
        """Runs steps, `workers` at a time, and leaves `reserve` seconds for later ones."""
        with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
            for done in concurrent.futures.as_completed(
                [pool.submit(self._run, step, reserve) for step in steps]
            ):
                outcome, output = done.result()
                self.note(outcome, output)

    def note(self, outcome: Outcome, output: str = "") -> None:
        """Records an outcome and prints it."""
        self.outcomes.append(outcome)
        heading = f"==== {outcome.name}: {outcome.status}, {outcome.seconds:.1f} s"
        with self._log.open("a") as log:
            log.write(f"{heading} {outcome.reason}\n{output}\n")
        print(f"{outcome.status:>11} {outcome.seconds:6.1f} s  {outcome.name}"
              f"{': ' + outcome.reason if outcome.reason else ''}", flush=True)  # fmt: skip

    def _run(self, step: Step, reserve: float) -> tuple[Outcome, str]:
        began = time.monotonic()
        seconds = min(step.seconds, self.ends - reserve - began)
        if seconds < SHORTEST:
            return Outcome(step.name, LATE, "not started: no time was left"), ""
        try:
            command = step.command(seconds)
            if isinstance(command, str):
                return Outcome(step.name, ABSENT, command), ""
            code, output = self._execute(command, seconds)
        except Exception as error:  # recorded as an outcome: the other steps go on
            reason = f"{type(error).__name__}: {error}"
            return Outcome(step.name, FAILED, reason, time.monotonic() - began), ""
        took = time.monotonic() - began
        if code is None:
            return Outcome(step.name, LATE, f"stopped after {seconds:.0f} s", took), output
        return Outcome(step.name, *step.judge(code, output), took), output

    def _execute(self, command: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Returns the exit code (None after the deadline) and the output.

        Output goes to a file: a pipe would stay open as long as any grandchild lives.
        """
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=self._cwd, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
                _end(process, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            self._running.discard(process)
            _end(process, signal.SIGKILL)  # the rest of the group
            process.wait()
            output.seek(0)
            return code, output.read()

    def stop(self) -> None:
        """Ends the running steps and starts no more; keeps the outcomes so far."""
        self.ends = 0.0
        for process in list(self._running):
            _end(process, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Signals the process and its children, if they still exist."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)
