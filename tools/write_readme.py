"""Writes README's claims and engines, between their markers, and the picture docs/overview.png.

Every number is read from the results in benchmarks/results/ that the linked page shows. `python
tools/write_readme.py` writes; with `--check` it only reports whether README is up to date.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import write_quality
import write_results
from PIL import Image
from result_tables import groups, median

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
NETWORK, SAMPLING = "CIFAR-10 32x32, B = 8", "CIFAR-10, ald against fast, 8 images"
OURS, RIVALS = "ours-bf16", ("inductor", "ort", "openvino")
HEIGHT, GAP = 402, 24  # of the overview


def claims() -> list[str]:
    """Returns README's claims, each a number and a link to the page that measures it."""
    results = json.loads(write_results.newest().read_text())
    network = groups(results, "workload")[NETWORK]
    rival = min((n for n in network if n.startswith(RIVALS)), key=lambda n: median(network[n]))
    times = {name: median(record) for name, record in network.items()}
    rates = {name: _rate(record) for name, record in groups(results, "rate")[SAMPLING].items()}
    model, mark, fast = _as_good(_load("quality.json")["records"])
    by_tuned = ", by the table that was tuned for it" if fast[0]["options"] else ""
    kinds = _load("fuzz.json")["kinds"].values()
    read = sum(kind["executions"] for kind in kinds)
    bad = sum(kind["failures"] for kind in kinds)
    found = [
        f"**{times['published'] / times[OURS]:.1f}x** the speed of the published code: one "
        "forward pass of the CIFAR-10 network of NCSNv2, 8 images, on a CPU "
        "([benchmarks](docs/benchmarks.md)).",
        f"**{times[rival] / times[OURS]:.1f}x** the speed of the fastest other runtime, "
        f"{rival}, in the same race ([benchmarks](docs/benchmarks.md)).",
        f"**{statistics.mean(r['nfe'] for r in fast):.0f} evaluations** of the network make "
        f"samples as good as the {statistics.mean(r['nfe'] for r in mark):.0f} of annealed "
        f"Langevin dynamics, on the {model} model{by_tuned} ([quality](docs/quality.md)).",
        f"**{rates['ours-tuned-bf16'] / rates['published']:.0f}x** the images per second of the "
        "published sampling loop for CIFAR-10, by a tuned table's evaluations; its weights are "
        "random here, so this is speed alone ([benchmarks](docs/benchmarks.md)).",
        f"**{read:,} damaged files** were read, with {bad} crashes, hangs or uncaught errors "
        "([reliability](docs/reliability.md)).",
    ]
    return found


def _as_good(
    records: list[dict[str, Any]],
) -> tuple[str, write_quality.Group, write_quality.Group]:
    """Returns a model that ships, the best measured one, and its records of ald and fast.

    Raises:
        ValueError: fast is as good as ald on none.
    """
    reasons = []
    for model in write_quality.models_of(records):
        of_method = {
            write_quality.label(group): group
            for group in write_quality.groups(records, model)
            if group[0]["steps"] is None
        }
        for name in (n for n in ("`fast` tuned", "`fast`") if n in of_method):
            missed = write_quality.misses(of_method[name], of_method["`ald`"])
            if not missed:
                return model, of_method["`ald`"], of_method[name]
            reasons.append(f"{', '.join(missed)} on {model}")
    raise ValueError(f"fast is not as good as ald in {'; '.join(reasons)}: mend the claim")


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _rate(record: dict[str, Any]) -> float:
    """Returns images per second of a whole sampling; see benchmarks/README.md."""
    info = record["extra_info"]
    return float(info["batch"] * info["evaluations"] / (median(record) * info["nfe"]))


# Engine -> what it is, what it needs, and its names in the results, of a CPU and of a GPU.
ENGINES = {
    "cpu": ("our C++ kernels and Winograd, oneDNN; bfloat16 or float32", "", ("ours-",), ()),
    "cuda": ("our Triton and CUDA kernels, loops in CUDA graphs", "an NVIDIA GPU", (), ("ours-",)),
    "trt": ("TensorRT and our update kernel", "an NVIDIA GPU, `tensorrt`", (), ("trt-",)),
    "ort": ("ONNX Runtime", "`.[onnx]`", ("ort",), ("ort-",)),
    "compile": ("torch.compile", "", ("inductor",), ("inductor-",)),
    "eager": ("plain PyTorch, the reference of all others", "", ("eager",), ("eager-",)),
}  # fmt: skip


def engines() -> list[str]:
    """Returns the rows of README's table of engines, with the machines that they were timed on."""
    files = [json.loads(path.read_text()) for path in write_results.by_date()]
    on_cpu = {
        write_results.machine(results): {
            record["extra_info"].get("provider", "") for record in results["benchmarks"]
        }
        for results in files
    }
    sessions = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    rows = ["| engine | what | needs | measured on |", "|---|---|---|---|"]
    for name, (what, needs, cpu_names, gpu_names) in ENGINES.items():
        machines = [
            f"[{cpu}](docs/benchmarks.md)"
            for cpu, providers in on_cpu.items()
            if _timed(providers, cpu_names)
        ]
        machines += [
            session["machine"]["gpu"]
            for session in sessions
            if _timed(
                {n for s in session["sections"] for g in s["groups"] for n in g["results"]},
                gpu_names,
            )
        ]
        rows.append(f"| `{name}` | {what} | {needs} | {', '.join(machines) or 'nothing yet'} |")
    return rows


def _timed(providers: set[str], starts: tuple[str, ...]) -> bool:
    return bool(starts) and any(name.startswith(starts) for name in providers)


def fill(text: str, name: str, lines: list[str]) -> str:
    """Replaces the text between the markers of a name; ValueError unless each occurs once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{README.name} must hold the lines {begin} and {end} once")
    before, rest = text.split(begin)
    return "\n".join([f"{before}{begin}", *lines, f"{end}{rest.split(end)[1]}"])


def overview() -> Image.Image:
    """Returns README's picture: the samples, and beside them the edits."""
    parts = [Image.open(DOCS / name).convert("L") for name in ("samples.png", "editing.png")]
    parts = [p.resize((p.width * HEIGHT // p.height, HEIGHT), Image.Resampling.BOX) for p in parts]
    picture = Image.new("L", (sum(p.width for p in parts) + GAP, HEIGHT), 255)
    picture.paste(parts[0], (0, 0))
    picture.paste(parts[1], (parts[0].width + GAP, 0))
    return picture


PICTURES = {
    "digits": [
        "*Left: 64 samples of the small digits model that ships with the package, unselected, as "
        "`make demo` draws them. Right:",
        "held-out digits completed, enlarged, sharpened and varied "
        "([how](docs/tutorials/editing.md)).*",
    ],
    "mnist": [
        "*Left: 64 samples of the mnist model that ships with the package "
        "([card](ncsn_fast/assets/mnist/README.md)), unselected,",
        "as `make demo` draws them. Right: one half of a seven completed eight times, and test "
        "digits enlarged from 7x7 pixels,",
        "sharpened and varied ([how](docs/tutorials/editing.md)).*",
    ],
}


def picture() -> list[str]:
    """Returns README's picture and its caption."""
    alt = (
        "Sixty-four samples, and four blocks of edited digits: originals, what the model was "
        "given, and its results"
    )
    with Image.open(DOCS / "editing.png") as edits:
        model = edits.info.get("model", "digits")  # of write_pictures.py
    return [f"![{alt}](docs/overview.png)", "", *PICTURES[model]]


def main() -> int:
    """Writes or checks; exit code 1 if README is out of date or the results do not suffice."""
    old = README.read_text()
    try:
        new = fill(old, "claims", [f"{i}. {claim}" for i, claim in enumerate(claims(), 1)])
        new = fill(new, "engines", engines())
        new = fill(new, "picture", picture())
    except (FileNotFoundError, ValueError) as error:
        print(error)
        return 1
    if "--check" not in sys.argv:
        README.write_text(new)
        overview().save(DOCS / "overview.png", optimize=True)
    elif new != old:
        print(f"out of date: {README.name}; run python tools/write_readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
