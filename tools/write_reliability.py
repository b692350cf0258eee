"""Writes docs/reliability.md: what kills, threads, a soak and damaged files have done to it.

`make campaign` and `make fuzz` measure, into campaign.json and fuzz.json of benchmarks/results/;
`python tools/write_reliability.py` then writes the page. With `--check` it only reports whether the
page is up to date; without results there must be none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results"
CAMPAIGN, FUZZ = "campaign.json", "fuzz.json"
SECTIONS = ("training", "sampling", "soak", "threads")
LEAST_FILES = 1_000_000  # that `make fuzz` reads

# Kind of damaged file (a module of tests/fuzz) -> what it is a file of, and what reads it.
KINDS = {
    "pictures": "images, masks, zips of images, sample folders",
    "json_texts": "`config.json`, `settings.json`, records of likelihoods",
    "run_checkpoints": "checkpoints of a training run: reading, resuming, the next step",
    "published_files": "published `.pth` of every family, weights of extractors",
    "score_sde_files": "`.pth` of score_sde_pytorch",
    "edm_pickles": "`.pkl` of EDM: their bytes, their opcodes, the storages in them",
    "diffusers_folders": "`config.json` and `scheduler_config.json` of diffusers",
    "safetensors_files": "`.safetensors` of model folders and extractors",
    "statistics_files": "`.npz` reference statistics, and the distance computed from them",
    "data_sets": "data sets: IDX, `.npy`, `.npz`, CIFAR's pickles and archives",
    "onnx_files": "ONNX files given to the engine `ort`",
}

INTRODUCTION = """\
# Reliability

What the package has gone through, and what held. `make campaign` (half an hour on two cores) and
`make fuzz` (hours) repeat it, and fail at a difference; a short form of both is part of
`make test-all`. Written by `tools/write_reliability.py` from `campaign.json` and `fuzz.json` of
`benchmarks/results/`.
"""

KILLS = """\
## Kills, threads, a soak

A process is killed (SIGKILL) within half a second of having saved something, or, one time in four,
within its first two seconds, and the same command is run again, until all kills are done.
"""

FILES = """\
## Damaged files

Each file is a good one that a seed has damaged (`tests/fuzz/`). Reading it ends in a result or in
one line of an error of ours, within a minute and 4 GiB; anything else counts as a failure.
"""


def read(name: str) -> dict[str, Any] | None:
    """Returns a file of results, or None if there is none."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def check_complete(campaign: dict[str, Any], fuzz: dict[str, Any]) -> None:
    """Raises ValueError unless all that the page speaks of has been measured, and has held."""
    missing = [name for name in SECTIONS if name not in campaign]
    if missing:
        raise ValueError(f"{CAMPAIGN} has no {', '.join(missing)}; make campaign adds them")
    kinds = fuzz["kinds"]
    if set(kinds) != set(KINDS):
        differing = ", ".join(sorted(set(kinds) ^ set(KINDS)))
        raise ValueError(f"{FUZZ} and KINDS differ in {differing}; make fuzz goes on")
    total = sum(figures["executions"] for figures in kinds.values())
    if total < LEAST_FILES:
        raise ValueError(f"{FUZZ} has {total:,} of {LEAST_FILES:,} files; make fuzz goes on")
    failed = [kind for kind, figures in kinds.items() if figures["failures"]]
    if failed:
        raise ValueError(f"{FUZZ} has failures of {', '.join(failed)}; mend them first")


def campaign_table(found: dict[str, Any]) -> str:
    """Renders markdown: a row per section of the campaign."""
    training, sampling = found["training"], found["sampling"]
    soak, threads = found["soak"], found["threads"]
    steps, shared = training["steps_compared_bit_for_bit"], threads["samplers"]
    rows = [
        ("`train`, killed and resumed", f"{training['kills']:,} kills",
         f"every checkpoint loads, no step is lost, and after {steps:,} steps weights, optimiser "
         "and average are bit for bit those of a run that nobody killed"),
        ("`sample --out-dir`, killed and repeated", f"{sampling['kills']:,} kills",
         f"{sampling['files_compared']:,} files are byte for byte those of one call; none is left "
         "over"),
        ("samples in one process", f"{soak['samples']:,} samples",
         f"all finite; memory grew by {soak['growth_mb']:g} MB from the first quarter to the last "
         f"(engine `{soak['engine']}`)"),
        ("calls from threads that share samplers",
         f"{threads['calls']:,} calls, {threads['threads']} threads, {shared} samplers",
         "every result is bit for bit that of a single thread; torch's number of threads is as "
         "before"),
    ]  # fmt: skip
    lines = ["| what | how much | what held |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def fuzz_table(kinds: dict[str, Any]) -> str:
    """Renders markdown: a row per kind of file, and their sum."""
    lines = [
        "| files | read | uncaught errors, crashes, hangs | most memory of a process |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for kind, what in KINDS.items():
        f = kinds[kind]
        lines.append(f"| {what} | {f['executions']:,} | {f['failures']} | {f['peak_mb']:,} MB |")
    total = sum(f["executions"] for f in kinds.values())
    failures = sum(f["failures"] for f in kinds.values())
    return "\n".join([*lines, f"| *all* | {total:,} | {failures} | |"])


def machine_line(campaign: dict[str, Any], versions: dict[str, str]) -> str:
    """Describes the machine and the versions."""
    m = campaign["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"*On an {m['cpu']} with {m['cores']} cores; kills, threads and soak at commit "
        f"{m['commit']} of ncsn_fast {m['ncsn_fast']}, files of each kind after its last mend; "
        f"{packages}.*"
    )


def render(campaign: dict[str, Any], fuzz: dict[str, Any]) -> str:
    """Returns the page."""
    tables = campaign_table(campaign), fuzz_table(fuzz["kinds"])
    end = machine_line(campaign, fuzz["versions"])
    return "\n".join([INTRODUCTION, KILLS, f"{tables[0]}\n", FILES, f"{tables[1]}\n", f"{end}\n"])


def main() -> int:
    """Writes or checks the page; exit code 1 if it is out of date, or the results are not whole."""
    campaign, fuzz = read(CAMPAIGN), read(FUZZ)
    if "--check" in sys.argv and campaign is None and fuzz is None and not PAGE.exists():
        print("docs/reliability.md: nothing has been measured yet")
        return 0
    try:
        if campaign is None or fuzz is None:
            missing = CAMPAIGN if campaign is None else FUZZ
            raise ValueError(f"benchmarks/results/{missing} is missing; make campaign, make fuzz")
        check_complete(campaign, fuzz)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = render(campaign, fuzz)
    if "--check" not in sys.argv:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        print("docs/reliability.md is out of date: python tools/write_reliability.py")
        return 1
    print("docs/reliability.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
