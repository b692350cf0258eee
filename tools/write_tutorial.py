"""Writes docs/tutorial.md: the score-SDE tutorial's experiment on MNIST, repeated.

    python -m ncsn_fast.train --config mnist-sde --data MNIST --steps 28125 --log-every 125
    python tools/write_tutorial.py --run runs/mnist-sde
    python tools/write_tutorial.py --bits runs/mnist-sde --data MNIST
    python tools/write_tutorial.py --samples runs/mnist-sde

The second command reads the run's losses from its TensorBoard log into
benchmarks/results/tutorial.json, the third adds the bits per dimension, the fourth draws samples
by the tutorial's three samplers, docs/tutorial.png; all write the page. Without options the page
is written from the file; `--check` only reports whether it is up to date.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tutorial.json"
PAGE = ROOT / "docs" / "tutorial.md"
AGREEMENT = ROOT / "docs" / "agreement.md"
BEGIN, END = "<!-- tutorial:begin -->", "<!-- tutorial:end -->"
PICTURE = ROOT / "docs" / "tutorial.png"
STEPS = 1875  # of an epoch: 60 000 images in batches of 32

# Mean losses of epochs as the tutorial's notebook prints them (GANs-Public, course 2, week 2).
PUBLISHED = (
    479.28, 191.41, 143.57, 125.47, 115.44, 107.29, 102.80, 98.80, 95.34, 93.05, 90.20, 88.15,
    86.73, 84.76, 82.96, 81.25, 80.50, 78.42, 77.70, 76.66, 76.10, 74.98, 74.80, 73.21, 72.97,
    72.27, 71.12, 70.74, 70.05, 69.18, 68.90, 68.66, 68.73, 68.24, 67.20, 67.31, 66.92, 66.28,
    65.34, 65.25, 64.49, 65.40, 63.95, 63.84, 63.83, 63.39, 63.26, 63.13, 62.14, 61.87,
)  # fmt: skip
PUBLISHED_BITS = (2.30, 2.44)  # range of its running mean over the first batches of 32

# The tutorial's samplers: 500 steps, snr 0.15, the predictor first, and the noisy state returned;
# the flow to tolerances of 1e-5. The norms of its corrector are means over the batch.
SAMPLERS: dict[str, dict[str, Any]] = {
    "Euler-Maruyama": {"method": "em", "steps": 500, "denoise": False},
    "predictor-corrector": {
        "method": "pc", "steps": 500, "order": "predictor_first", "snr": 0.15, "norm": "batch",
        "denoise": False,
    },
    "probability flow ODE": {"method": "ode", "rtol": 1e-5, "atol": 1e-5, "denoise": False},
}  # fmt: skip
SHOWN, COLUMNS, GAP = 32, 8, 12  # samples of each, columns of a grid, pixels between the grids

HEAD = """\
# The tutorial's experiment, repeated

`--config mnist-sde` is the network, loss and optimiser of the score-SDE tutorial: 28x28 MNIST, 1.05
M parameters, Adam at 1e-4, batches of 32. The losses of its notebook and ours, means over an epoch
of 1875 steps:

"""
TAIL = """
Both are single runs, of different seeds and noise. Written by `tools/write_tutorial.py` from
`benchmarks/results/tutorial.json`.
"""


def epochs(run: Path) -> list[float]:
    """Returns the mean loss of each whole epoch of a run, from its TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    entries = board.Scalars("loss")
    every = entries[0].step
    if STEPS % every or any(e.step % every for e in entries):
        raise SystemExit(f"--log-every must divide {STEPS}; the run's is {every}")
    seen: dict[int, dict[int, float]] = collections.defaultdict(dict)
    for entry in entries:
        seen[(entry.step - 1) // STEPS][entry.step] = entry.value
    whole = (seen[i] for i in range(len(seen)) if len(seen[i]) == STEPS // every)
    return [round(sum(values.values()) / len(values), 3) for values in whole]


def bits(run: Path, data: str, n: int) -> dict[str, Any]:
    """Returns what `evaluate --bpd` finds, in the tutorial's way: a Gaussian probe, t from 1e-3.

    Args:
        data: images in any format of --data.
    """
    import tempfile

    from ncsn_fast import evaluate

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bits.json"
        line = f"--model {run} --bpd --trace gaussian --n {n} --out {out} --data {data}"
        if code := evaluate.main(line.split()):
            raise SystemExit(code)
        found = json.loads(out.read_text())
        return {**found["bpd"], "data": found["images_sha256"], "step": step_of(run)}


def samples(model: str, picture: Path) -> list[dict[str, Any]]:
    """Draws a grid of each sampler, side by side; returns how they were drawn."""
    from PIL import Image

    from ncsn_fast import Sampler
    from ncsn_fast.data.images import make_grid

    sampler, found, grids = Sampler(model, dtype="fp32", batch_size=SHOWN), [], []
    for name, settings in SAMPLERS.items():
        images = sampler.sample(SHOWN, **settings)
        grids.append(Image.fromarray(make_grid(images, COLUMNS)).convert("L"))
        report = sampler.report
        assert report is not None
        words = [f"{k} {v}" for k, v in settings.items() if k not in ("method", "denoise")]
        found.append({
            "sampler": name, "method": settings["method"], "settings": ", ".join(words),
            "nfe": report.nfe, "engine": report.engine, "dtype": report.dtype,
        })  # fmt: skip
    width, height = grids[0].size
    whole = Image.new("L", (len(grids) * (width + GAP) - GAP, height), 255)
    for i, grid in enumerate(grids):
        whole.paste(grid, (i * (width + GAP), 0))
    whole.save(picture, optimize=True)
    return found


def step_of(run: Path) -> int:
    """Returns the newest step that a run has saved."""
    return max(int(path.stem.removeprefix("step_")) for path in run.glob("checkpoints/step_*.pt"))


def page(found: dict[str, Any]) -> str:
    """Returns the page."""
    ours = found["epochs"]
    rows = ["| epoch | tutorial | ours | ratio |", "|---|---|---|---|"]
    rows += [
        f"| {i + 1} | {PUBLISHED[i]:.1f} | {loss:.1f} | {loss / PUBLISHED[i]:.3f} |"
        for i, loss in enumerate(ours[: len(PUBLISHED)])
    ]
    text = HEAD + "\n".join(rows) + "\n"
    if measured := found.get("bits"):
        low, high = PUBLISHED_BITS
        text += (
            "\nBits per dimension with uniform dequantisation, one Gaussian probe, t from 1e-3, as "
            f"the tutorial has them after 50 epochs ({low:.2f} to {high:.2f}, its running mean "
            "over training images):\n\n| images | n | epochs | bits/dim |\n|---|---|---|---|\n"
        )
        text += "".join(
            f"| {split} | {b['n']} | {b['step'] / STEPS:.3g} | {b['mean']:.3f} "
            f"± {b['standard_error']:.3f} |\n"
            for split, b in measured.items()
        )
    if drawn := found.get("samples"):
        text += (
            f"\nIts three samplers with its settings, {SHOWN} unselected samples of each, "
            "seed 0:\n\n"
            f"![Three grids of digits, one a sampler]({PICTURE.name})\n\n"
            "| left to right | method | settings | evaluations | engine |\n|---|---|---|---|---|\n"
        )
        text += "".join(
            f"| {s['sampler']} | `{s['method']}` | {s['settings']} | {s['nfe']:g} "
            f"| {s['engine']} {s['dtype']} |\n"
            for s in drawn
        )
        text += (
            "\nThe tutorial returns the noisy state of its last step, as here. Its predictor is "
            "Euler-Maruyama where ours is\nreverse diffusion on the same levels, whose variances "
            "differ by the order of a step, and its flow ends at\nt = 0.01, ours at the least "
            "sigma.\n"
        )
    return text + TAIL


def summary(found: dict[str, Any]) -> str:
    """Returns what the page on agreement says of the experiment."""
    ours = found["epochs"][: len(PUBLISHED)]
    ratios = [loss / published for loss, published in zip(ours, PUBLISHED, strict=False)]
    text = (
        f"[The score-SDE tutorial's experiment, repeated](tutorial.md): {len(ours)} epochs of "
        f"MNIST, whose losses are {min(ratios):.3f} to {max(ratios):.3f}\ntimes those that its "
        f"notebook prints ({ours[-1]:.1f} and {PUBLISHED[len(ours) - 1]:.1f} in the last)"
    )
    if measured := found.get("bits"):
        low, high = PUBLISHED_BITS
        bits = ", ".join(
            f"{b['mean']:.2f} ± {b['standard_error']:.2f} ({split})"
            for split, b in measured.items()
        )
        epochs = max(b["step"] for b in measured.values()) / STEPS
        text += (
            f"; bits/dim after {epochs:.3g} epochs: {bits}; the notebook's, after "
            f"{len(PUBLISHED)}: {low:.2f} to {high:.2f}"
        )
    return text + "."


def summarised(text: str, found: dict[str, Any] | None) -> str:
    """Returns the page on agreement with the summary, or none, between its markers."""
    before, rest = text.split(BEGIN)
    block = f"\n{summary(found)}\n" if found else "\n"
    return f"{before}{BEGIN}{block}{END}{rest.split(END)[1]}"


def write(*, check: bool) -> bool:
    """Writes the page and its summary; returns whether both were up to date.

    Without results there is no page.
    """
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    texts = {AGREEMENT: summarised(AGREEMENT.read_text(), found)}
    if found is not None or PAGE.exists():
        texts[PAGE] = page(found) if found is not None else ""
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in stale if not check else []:
        path.write_text(texts[path])
    return not stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run whose losses are read")
    parser.add_argument("--bits", type=Path, help="run whose bits per dimension are measured")
    parser.add_argument("--data", help="folder of MNIST, for --bits")
    parser.add_argument("--n", type=int, default=256, help="images of --bits")
    parser.add_argument("--samples", help="run or model whose samples are drawn")
    parser.add_argument("--check", action="store_true", help="only report")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.run is not None:
        config = json.loads((options.run / "config.json").read_text())
        config = {name: value for name, value in config.items() if name not in ("runs", "data")}
        found |= {"epochs": epochs(options.run), "config": config}
    if options.bits is not None:
        for split in ("train", "test"):
            measured = bits(options.bits, f"{options.data}:{split}", options.n)
            found["bits"] = {**found.get("bits", {}), split: measured}
    if options.samples is not None:
        found["samples"] = samples(options.samples, PICTURE)
    if options.run is not None or options.bits is not None or options.samples is not None:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    fresh = write(check=options.check)
    if options.check and not fresh:
        print(f"out of date: {PAGE.name} or {AGREEMENT.name}; run python tools/write_tutorial.py")
    return int(options.check and not fresh)


if __name__ == "__main__":
    sys.exit(main())
