"""Writes the measured figures into docs/quality.md and the model card, between their markers.

`python tools/write_figures.py` rewrites; with `--check` it only says whether they are up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "ncsn_fast" / "assets" / "digits"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def table(
    runs: list[dict[str, Any]],
    title: str = "shipped digits model",
    real_title: str = "real held-out digits",
) -> str:
    """Returns the markdown table of figures, one column per way of sampling."""
    names = ["`{method}`, {engine} {dtype}".format(**r["sampling"]) for r in runs]
    rows: list[tuple[str, list[str]]] = [
        ("network evaluations", [f"{r['sampling']['nfe']:g}" for r in runs]),
        ("samples", [str(r["figures"]["n"]) for r in runs]),
        ("recognised as a digit", [f"{r['figures']['recognised']:.1%}" for r in runs]),
        ("rarest and commonest class", [_range(r["figures"]["class_share"]) for r in runs]),
        ("Fréchet distance to held-out digits", [f"{r['figures']['frechet']:.3f}" for r in runs]),
        ("nearest training digit, median", [f"{r['figures']['nearest_train']:.2f}" for r in runs]),
        ("copies of a training digit", [f"{r['figures']['copies']:.1%}" for r in runs]),
    ]
    real = runs[0]["figures"]
    held_out = {
        "recognised as a digit": "95.0% by definition",
        "Fréchet distance to held-out digits": f"{real['frechet_train']:.3f} (training digits)",
        "nearest training digit, median": f"{real['nearest_train_held_out']:.2f}",
        "copies of a training digit": "1.0% by definition",
    }
    lines = [
        f"| {title} | {' | '.join(names)} | {real_title} |",
        f"|---|{'---|' * (len(runs) + 1)}",
    ]
    lines += [f"| {n} | {' | '.join(v)} | {held_out.get(n, '')} |" for n, v in rows]
    return "\n".join(lines)


def _range(share: list[float]) -> str:
    return f"{min(share):.1%} to {max(share):.1%}"


def fill(text: str, block: str) -> str:
    """Replaces the text between the markers."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main() -> int:
    """Writes or checks the files; exit code 1 if --check finds a file out of date."""
    runs = [json.loads(path.read_text()) for path in sorted(CARD.glob("figures-*.json"))]
    if not runs:
        print(f"no figures-*.json in {CARD}; python -m ncsn_fast.evaluate --out makes them")
        return 1
    block = table(runs)
    stale = []
    for path in (ROOT / "docs" / "quality.md", CARD / "README.md"):
        old = path.read_text()
        new = fill(old, block)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run python tools/write_figures.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
