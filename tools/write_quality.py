"""Writes quality against evaluations into docs/quality.md, and draws docs/quality.png.

`python benchmarks/quality.py --out benchmarks/results/quality.json` measures; `python
tools/write_quality.py` then writes table and plot. With `--check` it only reports whether both
exist and the table is up to date.
"""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, PLOT = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.png"
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
FIT = RESULTS.with_name("fit-fast.json")
FIT_BEGIN, FIT_END = "<!-- fit:begin -->", "<!-- fit:end -->"
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
MARK, OURS = "ald", "fast"
MODELS = ("digits", "mnist")  # that ship; other kinds of data are mixtures
COLOURS = {
    "ald": "#333333", "fast": "#c0392b", "cas": "#2471a3", "dpmpp": "#1e8449", "heun": "#8e44ad",
    "euler": "#b9770e", "ancestral": "#16808a", "reverse": "#7f8c8d", "pc": "#a0522d",
    "ode": "#5d6d7e", "adaptive": "#9a7d0a", "em": "#ca6f1e",
}  # fmt: skip

Record = dict[str, Any]
Group = list[Record]


def figures(record: Record) -> dict[str, float]:
    """Returns the compared figures of a record, by name."""
    f = record["figures"]
    if record["data"] not in MODELS:
        return {"total_variation": f["total_variation"], "variance_ratio": f["variance_ratio"]}
    return {
        "recognised": f["recognised"],
        "frechet": f["frechet"],
        "rarest": min(f["class_share"]),
        "commonest": max(f["class_share"]),
        "nearest": f["nearest_train"],
        "copies": f["copies"],
    }


def truth(record: Record) -> dict[str, float]:
    """Returns the same figures of real data: 5 % unrecognised and 1 % copies, by definition."""
    if record["data"] not in MODELS:
        return {"total_variation": 0.0, "variance_ratio": 1.0}
    f = record["figures"]
    return {
        "recognised": 0.95,
        "frechet": f["frechet_train"],
        "rarest": 0.1,
        "commonest": 0.1,
        "nearest": f["nearest_train_held_out"],
        "copies": 0.01,
    }


def groups(records: list[Record], data: str) -> list[Group]:
    """Groups the records of a kind of data that differ only in the seed: ald, fast, then others."""
    found: dict[str, Group] = {}
    for r in records:
        if r["data"] == data:
            found.setdefault(json.dumps([r["method"], r["steps"], r["options"]]), []).append(r)
    order = list(dict.fromkeys(g[0]["method"] for g in found.values()))
    order.sort(key=lambda m: (m != MARK, m != OURS))
    return sorted(found.values(), key=lambda g: (order.index(g[0]["method"]), nfe(g)))


def nfe(group: Group) -> float:
    return statistics.mean(r["nfe"] for r in group)


def mean(group: Group, name: str) -> float:
    return statistics.mean(figures(r)[name] for r in group)


def shown(group: Group, name: str, digits: int = 3, scale: int = 1) -> str:
    """Returns the mean of a figure, with its standard error where there are two seeds or more."""
    return _with_error([scale * figures(r)[name] for r in group], digits)


def _with_error(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def band(group: Group, name: str) -> tuple[float, float]:
    """Returns mean plus or minus two standard deviations of one seed's figure."""
    values = [figures(r)[name] for r in group]
    if len(values) < 2:
        raise ValueError(f"{MARK} needs two seeds or more for a spread; run benchmarks/quality.py")
    centre, spread = statistics.mean(values), statistics.stdev(values)
    return centre - 2 * spread, centre + 2 * spread


def misses(group: Group, mark: Group) -> list[str]:
    """Returns the figures that are farther from real data than the band of the group `mark`."""
    found = []
    for name, real in truth(mark[0]).items():
        reach = max(abs(end - real) for end in band(mark, name))
        if abs(mean(group, name) - real) > reach:
            found.append(name)
    return found


SHORT = {"nearest": "nearest digit", "frechet": "Fréchet", "rarest": "rarest class",
         "commonest": "commonest class", "total_variation": "modes", "variance_ratio": "variance",
         }  # fmt: skip


def label(group: Group) -> str:
    """Returns the method and its settings, as command-line options."""
    first = group[0]
    options = {} if first["steps"] is None else {"steps": first["steps"]}
    options |= first["options"]
    return " ".join([f"`{first['method']}`", *_words(options)])


def _words(options: dict[str, Any]) -> list[str]:
    """Returns options with their values, in words; a table that was fitted is "tuned"."""
    return [v if isinstance(v, str) else f"{k} {v:g}" for k, v in options.items()]


def _verdict(group: Group, mark: Group) -> str:
    if group is mark:
        return "the mark"
    missed = misses(group, mark)
    return "no: " + ", ".join(SHORT.get(m, m) for m in missed) if missed else "**yes**"


def digits_table(records: list[Record], model: str = "digits") -> str:
    """Renders markdown: a row per method and setting, on a shipped model."""
    found = groups(records, model)
    mark = next(g for g in found if g[0]["method"] == MARK)
    lines = [
        f"| `{model}` | evaluations | recognised, % | Fréchet distance | rarest and commonest "
        "class, % | nearest training digit | copies, % | samples | as good as `ald` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in found:
        percent = {
            n: shown(group, n, 1, 100) for n in ("recognised", "rarest", "commonest", "copies")
        }
        lines.append(
            f"| {label(group)} | {nfe(group):.0f} | {percent['recognised']} "
            f"| {shown(group, 'frechet')} | {percent['rarest']} to {percent['commonest']} "
            f"| {shown(group, 'nearest', 2)} | {percent['copies']} "
            f"| {len(group)} x {group[0]['n']} | {_verdict(group, mark)} |"
        )
    real, spread = dict(truth(mark[0])), {}
    for name in real:
        low, high = band(mark, name)
        spread[name] = (high - low) / 2
    for name in ("recognised", "rarest", "commonest", "copies"):  # in per cent
        real[name], spread[name] = 100 * real[name], 100 * spread[name]
    lines += [
        f"| *two standard deviations of* `{MARK}` | | {spread['recognised']:.1f} "
        f"| {spread['frechet']:.3f} | {spread['rarest']:.1f}, {spread['commonest']:.1f} "
        f"| {spread['nearest']:.2f} | {spread['copies']:.1f} | | |",
        f"| *real digits* | | {real['recognised']:.0f} | {real['frechet']:.3f} | 10 "
        f"| {real['nearest']:.2f} | {real['copies']:.0f} | | |",
    ]
    return "\n".join(lines)


def mixture_table(records: list[Record]) -> str:
    """Renders markdown: the same methods with an exact score, a column per mixture."""
    kinds = sorted({r["data"] for r in records} - {*MODELS})
    found = {kind: {label(g): g for g in groups(records, kind)} for kind in kinds}
    heads = [f"deviation {kind.split('-')[1]}" for kind in kinds]
    lines = [
        f"| exact score | evaluations | {' | '.join(heads)} | as good as `ald` |",
        f"|---|---|{'---|' * len(kinds)}---|",
    ]
    for name in dict.fromkeys(name for of_kind in found.values() for name in of_kind):
        of_row = {k: found[k][name] for k in kinds if name in found[k]}
        cells = [
            f"{shown(of_row[k], 'total_variation')}, {shown(of_row[k], 'variance_ratio', 2)}"
            if k in of_row else "not run" for k in kinds
        ]  # fmt: skip
        verdicts = {k: _verdict(g, found[k][f"`{MARK}`"]) for k, g in of_row.items()}
        verdict = " / ".join(dict.fromkeys(verdicts.values()))
        evaluations = nfe(next(iter(of_row.values())))
        lines.append(f"| {name} | {evaluations:.0f} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def fit_table(points: list[Record]) -> str:
    """Renders markdown: the points of the family that the default of `fast` was chosen from."""
    kinds = [kind for kind in points[0]["figures"] if kind != "mnist8"]
    lines = [
        "| rows | bend | eta | history | final | recognised, % | Fréchet distance | classes "
        f"| nearest image | {' | '.join('deviation ' + k.split('-')[1] for k in kinds)} |",
        f"|---|---|---|---|---|---|---|---|---|{'---|' * len(kinds)}",
    ]
    for point in points:
        of = point["figures"]
        knots = (", ".join(f"{x:g}" for x in point[name]) for name in ("bend", "eta", "history"))
        cells = [
            str(point["rows"]), *knots, f"{point['final']:g}",
            _with_error([100 * x for x in of["mnist8"]["recognised"]], 1),
            *[_with_error(of["mnist8"][name], 3) for name in ("frechet", "classes", "nearest")],
            *[", ".join(_with_error(of[kind][name], n)
                        for name, n in (("total_variation", 3), ("variance_ratio", 2)))
              for kind in kinds],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


CAPTION = (
    "*Quality against evaluations. Above: the models that ship with the package, by the "
    "figures of their model cards, n samples of each seed. Below: a mixture of ten Gaussians "
    "around digits in 768 dimensions with unequal weights, whose exact score is known; total "
    "variation between drawn and true weights of the modes, and variance within them over the "
    "true one. Behind ±: the standard error over the seeds. "
    "A method is as good as `ald` where no figure, averaged over its seeds, is farther from that "
    "of real data than ald's seeds reach, their mean plus or minus two of their standard "
    "deviations; otherwise the figures that are get named. To repeat it:* `python "
    "benchmarks/quality.py "
    "--out benchmarks/results/quality.json`*, then* `python tools/write_quality.py`"
)


def block(records: list[Record]) -> str:
    """Returns all text between the markers."""
    picture = f"![Quality against network evaluations, for every method]({PLOT.name})"
    caption = textwrap.fill(CAPTION, 118, break_on_hyphens=False)
    tables = [digits_table(records, model) for model in models_of(records)]
    return "\n\n".join([picture, *tables, mixture_table(records), caption])


def models_of(records: list[Record]) -> list[str]:
    """Returns the models that were measured with ald's spread, the last of MODELS first."""
    seeds = {model: sum(r["data"] == model and r["method"] == MARK for r in records)
             for model in MODELS}  # fmt: skip
    return [model for model in reversed(MODELS) if seeds[model] > 1]


def fill(text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """Replaces the text between the markers; ValueError unless each occurs once."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(
            f"{PAGE.name} must hold the lines {begin} and {end} once, where the quality shall go"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def plot(records: list[Record], path: Path) -> None:
    """Plots recognised samples and Fréchet distance against evaluations, with ald's band shaded.

    They are those of the first model of models_of.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    model = models_of(records)[0]
    found = groups(records, model)
    mark = next(g for g in found if g[0]["method"] == MARK)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2))
    panels = {
        "recognised": f"{model}: recognised as a digit",
        "frechet": f"{model}: Fréchet distance to held-out digits",
    }
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        low, high = band(mark, name)
        axis.axhspan(low, high, color="#333333", alpha=0.10, linewidth=0)
        real = truth(mark[0])[name]
        axis.axhline(real, color="#333333", linewidth=0.8, linestyle=(0, (2, 3)))
        for text, x, y in (
            (f"{MARK} ± 2 sd", 0.74, (low * high) ** 0.5), ("real digits", 0.99, 1.004 * real)
        ):  # fmt: skip
            axis.annotate(text, (x, y), xycoords=("axes fraction", "data"), size=7.5, ha="right",
                          va="center" if x < 0.99 else "bottom", color="#555555")  # fmt: skip
        for method in dict.fromkeys(g[0]["method"] for g in found):
            _curve(axis, [g for g in found if g[0]["method"] == method], name)
        axis.set_xscale("log")
        ticks = [10, 20, 30, 50, 100, 250, 500]
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.xaxis.minorticks_off()
        axis.set_title(title, size=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("network evaluations per sample", size=9)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[1].yaxis.minorticks_off()
    handles, names = axes[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    figure.legend(handles, names, loc="center right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=200, metadata={"Software": None})
    pyplot.close(figure)


def _curve(axis: Any, of_method: list[Group], name: str) -> None:
    """Plots a method's points, joined if they differ only in the number of steps."""
    method = of_method[0][0]["method"]
    colour, strong = COLOURS.get(method, "#000000"), method in (MARK, OURS)
    lines: dict[str, list[Group]] = {}
    for group in of_method:
        lines.setdefault(json.dumps(group[0]["options"]), []).append(group)
    for options, line in lines.items():
        given = json.loads(options)
        text = " ".join([method, *_words(given)])
        axis.plot(
            [nfe(g) for g in line], [mean(g, name) for g in line], color=colour, label=text,
            marker="s" if given else "o", linestyle="--" if given else "-",
            markersize=6 if strong else 4, linewidth=2.2 if strong else 1.1,
            zorder=3 if strong else 2,
        )  # fmt: skip


def write(*, check: bool) -> list[str]:
    """Returns the names of outdated files; rewrites them, and the plot, unless `check`."""
    if not RESULTS.exists():
        raise FileNotFoundError(f"no {RESULTS.relative_to(ROOT)}; run benchmarks/quality.py first")
    records, page = json.loads(RESULTS.read_text())["records"], PAGE.read_text()
    wanted = fill(page, block(records))
    wanted = fill(wanted, fit_table(json.loads(FIT.read_text())), FIT_BEGIN, FIT_END)
    stale = [PAGE.name] if wanted != page else []
    if not check:
        PAGE.write_text(wanted)
        plot(records, PLOT)
    elif not PLOT.exists():
        stale.append(PLOT.name)
    return stale


def main() -> int:
    """Writes or checks.

    Exit code 1 if --check finds a file out of date or there is nothing to write.
    """
    check = "--check" in sys.argv
    try:
        stale = write(check=check)
    except (FileNotFoundError, ValueError) as error:
        print(error)
        return 1
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/write_quality.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
