"""Campaign of kills, mutated files, threads and a soak: nothing is lost, results stay the same.

    python tools/campaign.py            benchmarks/results/campaign.json: half an hour on two cores
    python tools/campaign.py --short    the same in a minute, without a file

Every section raises CampaignError at the first difference, so a figure that is written has held.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

import ncsn_fast
from ncsn_fast.checkpoints import training_run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "campaign.json"
TRAINING = [
    "--image-size", "8", "--ngf", "4", "--batch-size", "8", "--n-sigmas", "4", "--sigma-begin", "5",
    "--grid", "0", "--log-every", "50", "--threads", "1", "--device", "cpu",
]  # fmt: skip
SAMPLING = [
    "--model", "digits", "--method", "fast", "--steps", "4", "--batch-size", "16",
    "--threads", "1", "--quiet",
]  # fmt: skip
FULL = {
    "training_kills": 120, "sampling_kills": 80, "samples_of_kills": 1501, "soak_samples": 10_000,
    "threaded_calls": 400, "mutated_files": 10_000,
}  # fmt: skip
SHORT = {
    "training_kills": 3, "sampling_kills": 2, "samples_of_kills": 200, "soak_samples": 128,
    "threaded_calls": 8, "mutated_files": 500,
}  # fmt: skip


class CampaignError(AssertionError):
    """A result that differs from what an undisturbed run gives."""


def require(holds: bool, message: str) -> None:
    """Raises CampaignError unless a condition holds."""
    if not holds:
        raise CampaignError(message)


def command(name: str, arguments: list[str], folder: str) -> None:
    """Runs a command of the package in a folder, as the body of a process."""
    from ncsn_fast import sample, train
    from ncsn_fast.cli import command as commands

    os.chdir(folder)
    with open("output.txt", "ab") as log:  # of all lives
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    main = {"train": train.main, "sample": sample.main}[name]
    sys.exit(commands.run(lambda: main(arguments)))


class Lives:
    """Runs a command again and again, and kills it at a random moment of each life."""

    def __init__(self, context: BaseContext, folder: Path, seed: int) -> None:
        self.context, self.folder, self.random = context, folder, random.Random(seed)

    def run(self, name: str, arguments: list[str], progress: Callable[[], Any] | None) -> bool:
        """Starts the command and kills it, unless it ends before.

        Args:
            progress: () -> value that changes when the command has done something. Three lives of
                four are killed within half a second after that, the others within their first two
                seconds. None: the command is left alone.

        Returns:
            Whether it was killed; CampaignError if it ended by itself with a failure.
        """
        body = (name, arguments, str(self.folder))
        process = self.context.Process(target=command, args=body)  # type: ignore[attr-defined]
        before = progress and progress()
        process.start()
        if progress is None:
            process.join()
        elif self.random.random() < 0.25:
            process.join(2 * self.random.random())
        else:
            while process.is_alive() and progress() == before:
                time.sleep(0.005)
            process.join(0.5 * self.random.random())
        killed = bool(process.is_alive())
        if killed:
            process.kill()
            process.join()
        if not killed and process.exitcode != 0:
            said = (self.folder / "output.txt").read_text(errors="replace")[-2000:]
            raise CampaignError(f"{name} ended with {process.exitcode}: {said}")
        return killed


def kill_training(context: BaseContext, kills: int) -> dict[str, Any]:
    """Kills a training and resumes it; compares what it reached with a run that was left alone."""
    with tempfile.TemporaryDirectory() as folder:
        place, run = Path(folder), Path(folder) / "runs" / "digits"
        lives, reached, killed = Lives(context, place, 0), 0, 0
        endless = [*TRAINING, "--steps", "1000000", "--snapshot-every", "3"]
        while killed < kills:
            resume = ["--resume"] if training_run.is_run(run) else []
            killed += lives.run(
                "train", [*endless, *resume], lambda: training_run.checkpoint_paths(run)[-1:]
            )
            if training_run.is_run(run):
                saved = training_run.read_run(run)
                saved.model()
                require(saved.step >= reached, f"step {saved.step} after step {reached}")
                reached = saved.step
        broken = training_run.read_run(run).contents
        alone = Lives(context, place / "alone", 0)
        alone.folder.mkdir()
        steps = ["--steps", str(reached), "--snapshot-every", str(reached)]
        alone.run("train", [*TRAINING, *steps], None)
        whole = training_run.read_run(alone.folder / "runs" / "digits").contents
        for name in whole:
            if name != "train_config":  # the number of steps is another
                require(same(broken[name], whole[name]), f"{name} differs at step {reached}")
    return {"kills": killed, "steps_compared_bit_for_bit": reached}


def same(a: Any, b: Any) -> bool:
    """Compares nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill_sampling(context: BaseContext, kills: int, n: int) -> dict[str, Any]:
    """Kills `sample --out-dir` and repeats it; compares its files with those of one call."""
    killed = rounds = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        request = [*SAMPLING, "--n", str(n), "--out-dir"]
        Lives(context, place, 0).run("sample", [*request, "whole"], None)
        whole = files(place / "whole")
        while killed < kills:
            name, lives = f"killed-{rounds}", Lives(context, place, rounds)
            drawn = (place / name).rglob
            while lives.run("sample", [*request, name], lambda: sum(1 for _ in drawn("*.png"))):  # noqa: B023
                killed += 1
            require(files(place / name) == whole, f"files of {name} differ")
            rounds += 1
    return {"kills": killed, "files_compared": len(whole) * rounds}


def files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files of a folder by their relative paths."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def soak(n: int) -> dict[str, Any]:
    """Draws many samples in one process and watches its memory."""
    sampler = ncsn_fast.Sampler("digits", batch_size=64, threads=1)
    quarter, sizes = max(1, n // 4), []
    for first in range(0, n, quarter):
        count = min(quarter, n - first)
        images = sampler.sample(count, start=first, method="fast", progress=False)
        require(bool(torch.isfinite(images).all()), f"samples from {first} on are not finite")
        sizes.append(resident_mb())
    growth = sizes[-1] - sizes[0]
    require(growth < 64, f"memory grew by {growth:.0f} MB from quarter to quarter: {sizes}")
    return {"samples": n, "engine": sampler.engine_class.name, "growth_mb": round(growth, 1)}


def resident_mb() -> float:
    """Returns the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def call_from_threads(calls: int) -> dict[str, Any]:
    """Calls two samplers from four threads; compares each result with that of a single thread."""
    samplers = [ncsn_fast.Sampler("digits", batch_size=4, threads=k) for k in (1, 2)]
    options: dict[str, Any] = {"method": "fast", "steps": 4, "progress": False}
    expected = [samplers[k % 2].sample(4, seed=k % 10, **options) for k in range(10)]
    wrong: list[str] = []
    threads_before = torch.get_num_threads()

    def work(thread: int) -> None:
        for k in range(thread, calls, 4):
            try:
                images = samplers[k % 2].sample(4, seed=k % 10, **options)
            except Exception as error:
                wrong.append(f"call {k}: {error!r}")
                return
            if not torch.equal(images, expected[k % 10]):
                wrong.append(f"call {k} differs")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not wrong, "; ".join(wrong[:3]))
    require(torch.get_num_threads() == threads_before, "the number of torch's threads has changed")
    return {"calls": calls, "threads": 4, "samplers": 2}


def mutate_files(n: int) -> dict[str, Any]:
    """Reads damaged files of every kind (tools/fuzz.py)."""
    import fuzz

    found: dict[str, Any] = {"kinds": {}}
    for kind, share in fuzz.shares(n).items():
        fuzz.fuzz(kind, share, found, None)
        failures = found["kinds"][kind]["first_failures"]
        require(not failures, f"{kind}: {'; '.join(failures[:3])}")
    counts = {kind: figures["executions"] for kind, figures in found["kinds"].items()}
    return {"files": sum(counts.values()), **counts}


def machine() -> dict[str, Any]:
    """Describes where this ran."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine()
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": model, "cores": os.cpu_count(), "torch": torch.__version__,
        "ncsn_fast": ncsn_fast.__version__, "commit": commit,
    }  # fmt: skip


def main() -> int:
    """Runs all sections, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", help="some of the sections alone")
    parser.add_argument("--short", action="store_true", help="few of each; writes no file")
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the figures")
    chosen = parser.parse_args()
    counts = SHORT if chosen.short else FULL
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ncsn_fast.train", "ncsn_fast.sample"])
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "training": lambda: kill_training(context, counts["training_kills"]),
        "sampling": lambda: kill_sampling(
            context, counts["sampling_kills"], counts["samples_of_kills"]
        ),
        "soak": lambda: soak(counts["soak_samples"]),
        "threads": lambda: call_from_threads(counts["threaded_calls"]),
        "mutated": lambda: mutate_files(counts["mutated_files"]),
    }
    unknown = set(chosen.sections) - set(sections)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    found: dict[str, Any] = {"machine": machine()}
    if chosen.out.exists() and not chosen.short:
        found = {**json.loads(chosen.out.read_text()), **found}
    for name, section in sections.items():
        if chosen.sections and name not in chosen.sections:
            continue
        began = time.monotonic()
        found[name] = {**section(), "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        if not chosen.short:
            chosen.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
