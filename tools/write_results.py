"""Writes measured speeds into docs/benchmarks.md, and draws docs/benchmarks.png.

`pytest benchmarks/ --benchmark-only --benchmark-json=build/bench.json` measures; `python
tools/write_results.py build/bench.json` then reduces that file to the part worth committing, as
benchmarks/results/cpu-PROCESSOR.json, one file per kind of machine, and writes the page from all of
them: with several machines, a table of them side by side and then the tables of each. Without FILE
the newest cpu*.json of benchmarks/results/ is taken; it is the one that the plot shows. With
`--check` it only reports whether page and file are up to date. A second FILE is a later run of some
groups on the same machine, which replace those of the first; each group is then from one run, and
the caption names the measured commits.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from result_tables import FLOOR, groups, median, side_by_side, tables

ROOT = Path(__file__).resolve().parent.parent
PAGE, PLOT = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.png"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
STATISTICS = ("median", "q1", "q3", "min", "rounds", "iterations")
COMPUTED = (
    "`ald` against `fast`: all N evaluations were timed, or n of N, and then images/s are computed "
    "as images / (time / n x N). Quality is equal on the digits model (`benchmarks/results/"
    "quality.json`); CIFAR-10 has random weights here, so that is speed alone."
)


def strip(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the data that table and plot need, without raw samples and the machine's name."""
    commit = raw["commit"] if "commit" in raw else raw.get("commit_info", {}).get("id")
    return {
        "datetime": raw["datetime"],
        "commit": commit,
        "machine_info": {"ncsn_fast": raw["machine_info"]["ncsn_fast"]},
        "not_run": raw.get("not_run", []),
        "benchmarks": [
            {
                "name": b["name"],
                "group": b["group"],
                "commit": b.get("commit", commit),
                "extra_info": b["extra_info"],
                "stats": {key: b["stats"][key] for key in STATISTICS},
            }
            for b in raw["benchmarks"]
        ],
    }


def merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Merges stripped results of two runs: groups of the later one replace the earlier one's.

    Our own version may differ, since each group says its commit; the others must not.

    Raises:
        ValueError: the runs are of different machines, threads or versions of other packages.
    """
    if _surroundings(earlier) != _surroundings(later):
        raise ValueError("the two runs are of different machines, threads or versions")
    again = {b["group"] for b in later["benchmarks"]}
    order = list(dict.fromkeys(b["group"] for b in earlier["benchmarks"] + later["benchmarks"]))
    kept = [b for b in earlier["benchmarks"] if b["group"] not in again]
    not_run = [n for n in earlier["not_run"] if n["group"] not in again] + later["not_run"]
    benchmarks = sorted(kept + later["benchmarks"], key=lambda b: order.index(b["group"]))
    return later | {"benchmarks": benchmarks, "not_run": not_run}


def _surroundings(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of a run that are not ours: no version of this package, no level of it."""
    facts = results["machine_info"]["ncsn_fast"]
    others = {name: v for name, v in facts["versions"].items() if name != "ncsn_fast"}
    limit = facts["isa"] if facts.get("limits") else None
    return {**facts, "isa": limit, "limits": facts.get("limits") or {}, "versions": others}


def measured(results: dict[str, Any]) -> str:
    """Returns the measured commit; if there are several, with the groups of each."""
    of: dict[str, list[str]] = {}
    for record in results["benchmarks"]:
        of.setdefault(str(record["commit"])[:9], []).append(record["group"])
    if len(of) == 1:
        return f"commit {next(iter(of))}"
    main, *others = of
    rest = "; ".join(
        f"commit {c} for {', '.join(g for g in dict.fromkeys(of[c]) if _is_shown(g))}"
        for c in others
    )
    return f"commit {main}; {rest}"


def _is_shown(group: str) -> bool:
    """Returns whether a group has its own column (single ops have none)."""
    return any(word in group for word in ("B =", "images"))


def machine(results: dict[str, Any]) -> str:
    """Names the kind of machine: its processor, and the most that it can or is allowed to do."""
    facts = results["machine_info"]["ncsn_fast"]
    most = f"limited to {facts['isa']}" if facts.get("limits") else facts["flags"][-1]
    return f"{facts['processor']}, {most}"


def file_name(results: dict[str, Any]) -> str:
    """Returns the name of the file of a kind of machine."""
    words = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*(?=,)", " ", machine(results), flags=re.I)
    return f"cpu-{'-'.join(re.findall('[a-z0-9]+', words.lower()))}.json"


def caption(results: dict[str, Any], source: str) -> str:
    """Returns the measured quantities, the machine, and how to repeat the run."""
    facts = results["machine_info"]["ncsn_fast"]
    versions = ", ".join(
        f"{name} {v}" for name, v in facts["versions"].items() if v and name != "ncsn_fast"
    )
    rounds = [r["stats"]["rounds"] for r in results["benchmarks"] if "flop" in r["extra_info"]]
    limits = " ".join(f"{name}={level}" for name, level in facts.get("limits", {}).items())
    forced = f"limited by `{limits}`; " if limits else ""
    parts = [
        "*Cells: median time · times faster than `published`, the released code as it runs, or "
        "than `eager`, plain PyTorch · share of the time that the network's convolutions alone "
        "take (`convolutions-*`, same type).",
        f"{facts['processor']} ({', '.join(facts['flags'])}), {forced}threads: {facts['threads']}; "
        f"{versions}; {min(rounds)} to {max(rounds)} interleaved rounds; "
        f"{results['datetime'][:10]}, {measured(results)}: benchmarks/results/{source}. To repeat "
        f"it:* `make bench{'-avx2' if limits else ''}`",
    ]
    baselines = [
        r["extra_info"]["baseline_rss_mb"]
        for r in results["benchmarks"]
        if "baseline_rss_mb" in r["extra_info"]
    ]
    if baselines:
        parts.insert(
            1,
            "Peak memory: resident, in a process of its own that runs the last column; Python, "
            f"PyTorch and a model that is not yet run take {min(baselines):.0f} MB or more.",
        )
    parts[1:1] = [COMPUTED] if groups(results, "rate") else []
    lines = [" ".join(parts)]
    reasons = dict.fromkeys(f"`{n['provider']}`: {n['reason']}" for n in results["not_run"])
    if reasons:
        lines.append("*Not run:* " + "; ".join(reasons))
    return "\n\n".join(textwrap.fill(line, 118, break_on_hyphens=False) for line in lines)


def block(results: dict[str, Any], source: str) -> str:
    """Returns all text between the markers."""
    return "\n\n".join([*tables(results), caption(results, source)])


def blocks(machines: dict[str, dict[str, Any]]) -> str:
    """Returns the page's text of all machines, by the names of their files."""
    if len(machines) == 1:
        return "".join(block(results, source) for source, results in machines.items())
    parts = [side_by_side({machine(results): results for results in machines.values()})]
    for source, results in machines.items():
        parts += [f"### {machine(results)}", block(results, source)]
    return "\n\n".join(parts)


def fill(text: str, content: str) -> str:
    """Replaces the text between the markers; ValueError unless each occurs once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(
            f"{PAGE.name} must hold the lines {BEGIN} and {END} once, where the results shall go"
        )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots the CIFAR-10 network's time over that of its bf16 convolutions, a panel per batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    floor = FLOOR.format(dtype="bf16")
    found = groups(results, "workload").items()
    panels = {g: r for g, r in found if g.startswith("CIFAR-10") and floor in r}
    if not panels:
        raise ValueError(f"the results hold no CIFAR-10 group with {floor}: nothing to plot")
    names = list(dict.fromkeys(name for group in panels.values() for name in group))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(8, 0.6 + 0.32 * len(names)), sharey=True, squeeze=False
    )
    for axis, (title, group) in zip(axes[0], panels.items(), strict=True):
        ratios = [median(group[n]) / median(group[floor]) if n in group else 0.0 for n in names]
        colours = ["#c0392b" if n.startswith("ours") else "#8aa4b8" for n in names]
        bars = axis.barh(names, ratios, color=colours)
        axis.bar_label(bars, [f"{r:.2f}" if r else "not run" for r in ratios], padding=2, size=8)
        axis.axvline(1, color="#555555", linewidth=0.8, zorder=0)
        axis.set_title(title, size=9)
        axis.set_xlim(0, 1.25 * max(ratios))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.supxlabel("time of one forward, bf16 convolutions alone = 1", size=9)
    figure.tight_layout()
    figure.savefig(path, dpi=200, metadata={"Software": None})
    pyplot.close(figure)


def by_date() -> list[Path]:
    """Returns the results files, the latest first, those of limited processors last."""
    files = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu*.json"))}
    return sorted(files, key=lambda path: _rank(files[path]), reverse=True)


def _rank(results: dict[str, Any]) -> tuple[bool, str]:
    return not results["machine_info"]["ncsn_fast"].get("limits"), results["datetime"]


def newest() -> Path:
    """Returns the latest results file; FileNotFoundError says how to make one."""
    files = by_date()
    if not files:
        raise FileNotFoundError(f"no cpu*.json in {RESULTS.relative_to(ROOT)}; see {__file__}")
    return files[0]


def write(source: Path, again: list[Path], *, check: bool) -> list[str]:
    """Returns the names of outdated files; rewrites them, and the plot, unless `check`."""
    page = PAGE.read_text()
    results = strip(json.loads(source.read_text()))
    for path in again:
        results = merge(results, strip(json.loads(path.read_text())))
    target = source if source.parent == RESULTS else RESULTS / file_name(results)
    old = target.read_text() if target.exists() else ""
    others = (path for path in by_date() if path != target)
    all_of = {path.name: strip(json.loads(path.read_text())) for path in others}
    all_of[target.name] = results
    latest = sorted(all_of, key=lambda name: _rank(all_of[name]), reverse=True)
    wanted = {
        target: (old, json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        PAGE: (page, fill(page, blocks({name: all_of[name] for name in latest}))),
    }
    stale = [path for path, (before, after) in wanted.items() if before != after]
    if not check:
        for path in stale:
            path.write_text(wanted[path][1])
        plot(all_of[latest[0]], PLOT)
    elif not PLOT.exists():
        stale.append(PLOT)
    return [path.name for path in stale]


def main() -> int:
    """Writes or checks.

    Exit code 1 if --check finds a file out of date or there is nothing to write.
    """
    files = [Path(a) for a in sys.argv[1:] if a != "--check"]
    check = "--check" in sys.argv
    try:
        source, *again = files or [newest()]
        stale = write(source, again, check=check)
    except (FileNotFoundError, ValueError) as error:
        print(error)
        return 1
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/write_results.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
