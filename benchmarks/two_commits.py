"""Compares the speed of two commits: one process of each, which take turns, round by round.

    git worktree add ../before COMMIT && (cd ../before && make setup)
    python benchmarks/two_commits.py ../before . --out benchmarks/results/commits-NAME.json

Times the score at one noise level through `Sampler(engine="cpu")`, and the processes' start: from
nothing to the first picture of the digits model, with filled caches. Outputs are compared first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Name: architecture, its options, shape of an image, batch sizes.
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], tuple[int, ...]]] = {
    "CIFAR-10 NCSNv2": ("ncsnv2", {"ngf": 128}, (3, 32, 32), (1, 8)),
    "digits' NCSNv2": ("ncsnv2", {"ngf": 24}, (1, 16, 16), (8,)),
    "CIFAR-10 NCSN": ("ncsn", {"ngf": 128}, (3, 32, 32), (1,)),
}
DTYPES = ("fp32", "bf16")
LAST = "CIFAR-10 NCSN"  # conditional networks are slow to build; fp32 is enough for them

WORKER = """
import json, sys, time
import torch
import ncsn_fast
from ncsn_fast import ModelConfig, Sampler, ScoreModel

arch, options, shape, batch, dtype, threads = json.loads(sys.argv[1])
torch.manual_seed(0)
channels, *size = shape
model = ScoreModel(ModelConfig(arch=arch, image_size=tuple(size), channels=channels, **options))
sampler = Sampler(model.eval(), engine="cpu", dtype=dtype, batch_size=batch, threads=threads)
x = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(1))
sigma = float(model.sigmas[5])
score = sampler.score(x, sigma).double()
print(json.dumps([float(score.mean()), float(score.norm())]), flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    for _ in range(int(line)):
        sampler.score(x, sigma)
    print((time.perf_counter() - began) / int(line), flush=True)
"""
START = """
from ncsn_fast import Sampler
Sampler("digits", engine="cpu").sample(1, method="fast", progress=False)
"""
SHORTEST_LAP = 0.25  # seconds; shorter calls are repeated


class Worker:
    """A process that imports the package of one checkout, and times what it is told to."""

    def __init__(self, root: Path, case: list[Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(case)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(root),
        )  # fmt: skip

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker stopped; its error is above")
        return json.loads(line)

    def time(self, calls: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        self.process.communicate()


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


def compare(before: Path, after: Path, case: list[Any], rounds: int) -> dict[str, Any]:
    """Times one case in both checkouts, in turns; who begins changes from round to round."""
    workers = {"before": Worker(before, case), "after": Worker(after, case)}
    sums = {name: worker.read() for name, worker in workers.items()}
    norm = sums["before"][1]
    if abs(sums["after"][1] - norm) > 2e-2 * norm:
        raise SystemExit(f"{case}: the two commits compute different scores: {sums}")
    calls = max(1, round(SHORTEST_LAP / min(w.time(3) for w in workers.values())))
    laps: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name in list(workers)[:: 1 if turn % 2 else -1]:
            laps[name].append(workers[name].time(calls))
    for worker in workers.values():
        worker.close()
    return summary(laps)


def starts(before: Path, after: Path, rounds: int) -> dict[str, Any]:
    """Times whole processes, after one of each that fills the caches."""
    laps: dict[str, list[float]] = {"before": [], "after": []}
    for turn in range(rounds + 1):
        for name, root in (("before", before), ("after", after)):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", START], check=True, env=environment(root))
            if turn:
                laps[name].append(time.perf_counter() - began)
    return summary(laps)


def summary(laps: dict[str, list[float]]) -> dict[str, Any]:
    """Returns medians in seconds, and the quartiles of the ratio before / after of a round."""
    ratios = [b / a for b, a in zip(laps["before"], laps["after"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "rounds": len(ratios),
        **{name: statistics.median(values) for name, values in laps.items()},
        "ratio": middle, "ratio_q1": low, "ratio_q3": high,
    }  # fmt: skip


def commit(root: Path) -> str:
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    before, after = arguments.before.resolve(), arguments.after.resolve()
    from conftest import machine_facts

    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "before": commit(before), "after": commit(after),
        "machine": machine_facts(), "threads": arguments.threads, "cases": {},
    }  # fmt: skip
    for name, (arch, options, shape, batches) in NETWORKS.items():
        for batch in batches:
            for dtype in DTYPES[: 1 if name == LAST else None]:
                case = [arch, options, shape, batch, dtype, arguments.threads]
                result = compare(before, after, case, arguments.rounds)
                found["cases"][f"{name}, B = {batch}, {dtype}"] = result
                print(name, batch, dtype, f"{result['ratio']:.3f}", flush=True)
    found["cases"]["start to the first digit"] = starts(
        before, after, max(5, arguments.rounds // 2)
    )
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
