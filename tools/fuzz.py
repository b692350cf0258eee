"""Damaged files, and everything that reads files: `python tools/fuzz.py [N]`.

    python tools/fuzz.py 1000000          so many in all: benchmarks/results/fuzz.json
    python tools/fuzz.py 7000 onnx_files  of one kind

Each kind (a module of tests/fuzz) has a process of its own, whose memory is bounded. One that dies
or hangs is replaced, and counts as a failure of its file. Figures are written as they grow; the
same command goes on where it was stopped. Exit code 1 if a file ended in anything but a result or
one line of an error of ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("fuzz", "support")]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
# Shares of all files, the fewer the longer one takes: from 1.5 ms (a picture) to 150 ms (a run).
KINDS = {
    "pictures": 0.331, "json_texts": 0.143, "safetensors_files": 0.17, "statistics_files": 0.225,
    "data_sets": 0.1, "edm_pickles": 0.01, "published_files": 0.005, "score_sde_files": 0.004,
    "diffusers_folders": 0.005, "onnx_files": 0.005, "run_checkpoints": 0.002,
}  # fmt: skip
AT_ONCE = 500  # files between two writings of the figures
PATIENCE = 60.0  # seconds without a new file
MEMORY = 4 * 2**30  # bytes that a process may take beyond what it has at its start


def work(kind: str, results: Connection, seeds: Any) -> None:
    """The body of a process: for every (first, n) that it is sent, the figures of those seeds."""
    parser, harness = importlib.import_module(kind), importlib.import_module("harness")
    parser.check(parser.mutate(0))  # what is imported late is no memory of a file
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))

    def begins(seed: int) -> None:
        seeds.value = seed

    while True:
        first, n = results.recv()
        results.send(harness.run(parser.mutate, parser.check, n, first, begins))


class Worker:
    """A process of one kind, replaced when it dies or hangs."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self.seed = self.context.Value("q", -1, lock=False)
        self.results, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=work, args=(self.kind, theirs, self.seed), daemon=True
        )
        self.process.start()
        theirs.close()

    def run(self, first: int, n: int) -> list[dict[str, Any]]:
        """Figures of n seeds, in as many parts as processes were needed."""
        parts, end = [], first + n
        while first < end:
            self.seed.value = -1
            self.results.send((first, end - first))
            found = self._figures()
            if isinstance(found, dict):
                return [*parts, found]
            at = max(first, self.seed.value)
            self.close()
            self._start()
            if at > first:  # those before it were fine; once more, for their figures
                parts += self.run(first, at - first)
            parts.append(of_one_failure(at, found))
            first = at + 1
        return parts

    def _figures(self) -> dict[str, Any] | str:
        """Waits for the figures, or for the reason why there are none."""
        seed, since = -1, time.monotonic()
        while not self.results.poll(0.2):
            if self.seed.value != seed:
                seed, since = self.seed.value, time.monotonic()
            patience = PATIENCE if seed >= 0 else 10 * PATIENCE  # imports come before the first
            if time.monotonic() - since > patience:
                return f"no end after {patience:g} s"
        try:
            return self.results.recv()
        except EOFError:
            self.process.join()
            return f"the process ended with {self.process.exitcode}"

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.results.close()


def of_one_failure(seed: int, reason: str) -> dict[str, Any]:
    """Figures of a file that ended its process."""
    return {
        "executions": 1, "first_seed": seed, "read": {}, "failures": 1,
        "first_failures": [f"seed {seed}: {reason}"], "slowest_seconds": 0.0, "slowest_seed": seed,
        "seconds": 0.0, "peak_mb": 0,
    }  # fmt: skip


def joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Adds the figures of later seeds to earlier ones."""
    names = {*a["read"], *b["read"]}
    slowest = max((a, b), key=lambda part: part["slowest_seconds"])
    return {
        "executions": a["executions"] + b["executions"],
        "first_seed": a["first_seed"],
        "read": {name: a["read"].get(name, 0) + b["read"].get(name, 0) for name in sorted(names)},
        "failures": a["failures"] + b["failures"],
        "first_failures": [*a["first_failures"], *b["first_failures"]][:20],
        "slowest_seconds": slowest["slowest_seconds"],
        "slowest_seed": slowest["slowest_seed"],
        "seconds": round(a["seconds"] + b["seconds"], 1),
        "peak_mb": max(a["peak_mb"], b["peak_mb"]),
    }


def fuzz(kind: str, n: int, found: dict[str, Any], out: Path | None) -> None:
    """Completes the figures of a kind to n executions, and writes all that is found."""
    done = found["kinds"].get(kind)
    worker = None
    while (reached := 0 if done is None else done["executions"]) < n:
        worker = worker or Worker(kind)
        for part in worker.run(reached, min(AT_ONCE, n - reached)):
            done = part if done is None else joined(done, part)
        found["kinds"][kind] = done
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n")
    if worker is not None:
        worker.close()


def shares(n: int, kinds: Iterable[str] = KINDS) -> dict[str, int]:
    """Returns the number of files of each kind, n in all (up to rounding)."""
    whole = sum(KINDS[kind] for kind in kinds)
    return {kind: math.ceil(n * KINDS[kind] / whole) for kind in kinds}


def versions() -> dict[str, str]:
    """Names what read the files: a seed makes the same file with the same versions."""
    packages = ("numpy", "onnx", "PIL", "safetensors", "torch")
    found = {name: importlib.import_module(name).__version__ for name in packages}
    return {"python": platform.python_version(), **found}


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 if nothing failed."""
    parser = argparse.ArgumentParser(description="Damaged files, and everything that reads files.")
    parser.add_argument("n", type=int, nargs="?", default=1_000_000, help="files in all")
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file of the figures")
    chosen = parser.parse_args(arguments)
    kinds = chosen.kinds or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    found: dict[str, Any] = {"versions": versions(), "kinds": {}}
    if chosen.out.exists():
        before = json.loads(chosen.out.read_text())
        if before["versions"] == found["versions"]:
            found = before
    for kind, n in shares(chosen.n, kinds).items():
        fuzz(kind, n, found, chosen.out)
        done = found["kinds"][kind]
        print(f"{kind}: {json.dumps(done)}", flush=True)
    return int(any(found["kinds"][kind]["failures"] for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
