"""Renders the markdown of a GPU session from its JSON: `python tools/write_gpu_results.py FILE`.

Every number comes from the JSON, which tools/gpu_session.py writes; missing measurements are marked
as such.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Group = dict[str, Any]
REQUIRED = {  # the design's performance requirements on a GPU
    "norm": 0.85, "update": 0.90, "published": 6.0, "compiled": 1.2, "launch-bound": 6.0,
    "matrix units": 0.55,
}  # fmt: skip
FAMILIES = {"triton": "Triton", "cuda": "CUDA C++"}


class Results:
    """Queries on a session's JSON."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.groups: list[Group] = [g for s in raw["sections"] for g in s["groups"]]
        self.not_run = [row for s in raw["sections"] for row in s["not_run"]]

    def group(self, title: str) -> Group | None:
        return next((g for g in self.groups if g["group"] == title), None)

    def beginning(self, start: str) -> list[Group]:
        return [g for g in self.groups if g["group"].startswith(start)]

    def rate(self, title: str, fact: str) -> float | None:
        """Returns bytes or FLOP per second of a ceiling."""
        group = self.group(title)
        if group is None:
            return None
        return float(group["facts"][fact] / next(iter(medians(group).values())))

    @property
    def copy(self) -> float | None:
        return self.rate("device copy", "bytes")

    @property
    def matmul(self) -> float | None:
        return self.rate("bf16 matrix product", "flop")


def medians(group: Group | None) -> dict[str, float]:
    """Returns the median seconds per call of each provider."""
    return {} if group is None else {n: r["median"] for n, r in group["results"].items()}


def fastest(times: dict[str, float], *starts: str) -> tuple[str, float] | None:
    """Returns the provider with the smallest median among those with these name prefixes."""
    found = [(seconds, name) for name, seconds in times.items() if name.startswith(starts)]
    return (min(found)[1], min(found)[0]) if found else None


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def share(value: float, limit: float | None) -> str:
    return "" if limit is None else f"{value / limit:.0%}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([row(header), row(["---"] * len(header)), *map(row, rows)])


# Required and measured ---------------------------------------------------------------------------


def requirements(r: Results) -> str:
    """Renders the design's GPU requirements, as required and as measured."""
    rows = [[what, against, required, measured] for what, against, required, measured in checks(r)]
    return table(["where", "against", "at least", "measured"], rows)


def verdict(value: float | None, required: float, form: str, note: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "not measured"
    met = "met" if value >= required else "**missed**"
    return f"{value:{form}}{'x' if form.endswith('f') else ''}, {met}{note}"


def checks(r: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yields (what, against, required, measured) of each row."""
    for title, start, need in (
        ("IN++ with ELU", "IN++ with ELU", REQUIRED["norm"]),
        ("group norm with SiLU", "group norm with SiLU", REQUIRED["norm"]),
        ("sampler update", "sampler update", REQUIRED["update"]),
    ):
        groups = [g for g in r.beginning(start) if g["facts"]["cache"] == "cold"]
        best = best_of_shapes(groups)
        if not best:
            yield title, "device copy", f"{need:.0%}", "not measured"
        for group in best:
            found = fastest(medians(group), *FAMILIES)
            value = None if found is None or r.copy is None else (
                group["facts"]["bytes"] / found[1] / r.copy
            )  # fmt: skip
            note = "" if found is None else f", {found[0]}"
            yield group["group"], "device copy", f"{need:.0%}", verdict(value, need, ".0%", note)
    large, small = step(r, 256), step(r, 1)
    compiled = medians(r.group("one sampling step, B = 256, compiled"))
    yield ("step, B = 256", "published, float32", f"{REQUIRED['published']:g}x",
           ratio(large, "published-fp32", REQUIRED["published"]))  # fmt: skip
    yield ("step, B = 256", "torch.compile max-autotune, bf16", f"{REQUIRED['compiled']:g}x",
           ratio(compiled, "inductor", REQUIRED["compiled"]))  # fmt: skip
    need = REQUIRED["launch-bound"]
    for base in ("published-tf32", "eager-bf16"):
        yield "step, B = 1", base, f"{need:g}x", ratio(small, base, need)
    group, found = r.group("one sampling step, B = 256"), fastest(large, "ours")
    need, value = REQUIRED["matrix units"], None
    if group is not None and found is not None and r.matmul is not None:
        value = group["facts"]["flop"] / found[1] / r.matmul
    yield "step, B = 256", "bf16 matrix product", f"{need:.0%}", verdict(value, need, ".0%")


def best_of_shapes(groups: list[Group]) -> list[Group]:
    """Returns, for each shape, the group of its largest batch."""
    shapes: dict[str, Group] = {}
    for group in groups:
        shape = group["group"].split(", B =")[0]
        if shape not in shapes or group["facts"]["batch"] > shapes[shape]["facts"]["batch"]:
            shapes[shape] = group
    return list(shapes.values())


def step(r: Results, batch: int) -> dict[str, float]:
    return medians(r.group(f"one sampling step, B = {batch}"))


def ratio(times: dict[str, float], base: str, need: float) -> str:
    ours, other = fastest(times, "ours"), fastest(times, base)
    if ours is None or other is None:
        return "not measured"
    return verdict(other[1] / ours[1], need, ".2f", f", {ours[0]}")


# Tables ------------------------------------------------------------------------------------------


def ladder(group: Group, r: Results) -> str:
    """Renders one sampling step, a row per provider."""
    times, facts = medians(group), group["facts"]
    bases = [b for b in ("published-fp32", "published-tf32", "eager-bf16") if b in times]
    header = [group["group"], "a step", *(f"times {b}" for b in bases), "TFLOP/s",
              "of matrix product", "images/s"]  # fmt: skip
    rows = []
    for name, time in times.items():
        rate = facts["flop"] / time
        rows.append([
            f"**`{name}`**" if name.startswith("ours") else f"`{name}`", seconds(time),
            *(f"{times[b] / time:.2f}x" for b in bases), f"{rate / 1e12:.3g}",
            share(rate, r.matmul), f"{facts['batch'] / time / facts['nfe']:.3g}",
        ])  # fmt: skip
    return table(header, rows)


def kernels(r: Results) -> str:
    """Renders GB/s and share of the copy bandwidth, a column per provider."""
    groups = [g for start in ("IN++", "group norm", "sampler update") for g in r.beginning(start)]
    names = list(dict.fromkeys(name for group in groups for name in group["results"]))
    rows = []
    for group in groups:
        times = medians(group)
        cells = [group["group"]]
        for name in names:
            if name not in times:
                cells.append("")
                continue
            rate = group["facts"]["bytes"] / times[name]
            part = share(rate, r.copy)
            cells.append(f"{seconds(times[name])}, {rate / 1e9:.0f} GB/s{', ' * bool(part)}{part}")
        rows.append(cells)
    return table(["kernel", *(f"`{name}`" for name in names)], rows)


def dilations(groups: list[Group], r: Results) -> str:
    rows = [
        [group["group"], name, seconds(time), f"{group['facts']['flop'] / time / 1e12:.3g}",
         share(group["facts"]["flop"] / time, r.matmul)]
        for group in groups for name, time in medians(group).items()
    ]  # fmt: skip
    header = ["3x3, cuDNN, bf16, channels-last", "dilation", "time", "TFLOP/s", "of matrix product"]
    return table(header, [[a, b.removeprefix("dilation "), *rest] for a, b, *rest in rows])


def faster_family(r: Results) -> str:
    """Renders which kernel family is faster, per kernel and in the whole step."""
    lines = []
    for title, start in (("IN++ with ELU", "IN++"), ("group norm with SiLU", "group norm"),
                         ("sampler update", "sampler update"),
                         ("sampling step", "one sampling step")):  # fmt: skip
        prefix = "ours-" if title == "sampling step" else ""
        ratios = []
        for group in r.beginning(start):
            one, other = (fastest(medians(group), prefix + family) for family in FAMILIES)
            if one is not None and other is not None:
                ratios.append(other[1] / one[1])
        if not ratios:
            lines.append(f"{title}: not comparable, one family is missing")
            continue
        mean = statistics.geometric_mean(ratios)
        first, second = FAMILIES.values() if mean >= 1 else reversed(FAMILIES.values())
        lines.append(
            f"{title}: {first} is {max(mean, 1 / mean):.2f} times as fast as {second} "
            f"(geometric mean of {len(ratios)} groups)"
        )
    return "Faster family, the default to be: " + "; ".join(lines) + "."


def conditions(r: Results) -> str:
    """Renders device, versions, clocks and the measurement method."""
    m = r.raw["machine"]
    facts = [f"{k} {v}" for k, v in m.items() if v is not None and k != "gpu"]
    lines = [f"- {m['gpu']}; {', '.join(facts)}",
             f"- {r.raw['datetime']}, commit {str(r.raw['commit'])[:9]}"]  # fmt: skip
    for section in r.raw["sections"]:
        state = section.get("after") or {}
        if state:
            values = ", ".join(f"{k} {v}" for k, v in state.items())
            lines.append(f"- after {section['section']}: {values}")
    lines.append(
        "- medians of interleaved rounds, random data, every output verified first; kernels in "
        "CUDA graphs, `cold`: inputs rotate through four times the L2 cache, `warm`: one input; "
        "steps: five of a noise level, then a wait for the device; images/s: by the number of "
        "network evaluations of the published sampler"
    )
    return "\n".join(lines)


def render(raw: dict[str, Any], name: str) -> str:
    """Renders the whole page."""
    r = Results(raw)
    limits = [
        "copy: not measured" if r.copy is None else f"copy {r.copy / 1e12:.3g} TB/s",
        "matrix product: not measured" if r.matmul is None
        else f"bf16 matrix product {r.matmul / 1e12:.3g} TFLOP/s",
    ]  # fmt: skip
    head = "A rehearsal on a CPU: no number here means anything.\n\n" if raw["rehearsal"] else ""
    steps = r.beginning("one sampling step")
    convolutions = [g for g in r.groups if " channels, " in g["group"]]
    parts = [
        f"# {raw['machine']['gpu']}", f"{head}Limits measured in this run: {'; '.join(limits)}.",
        "## Required and measured", requirements(r), "## Sampling step",
        *(ladder(group, r) for group in steps), faster_family(r), "## Kernels", kernels(r),
        "## Convolutions", dilations(convolutions, r), "## Conditions", conditions(r),
    ]  # fmt: skip
    if r.not_run:
        reasons = [[n["group"], f"`{n['provider']}`", n["reason"].replace("|", "/")]
                   for n in r.not_run]  # fmt: skip
        parts += ["## Not run", table(["group", "provider", "reason"], reasons)]
    parts += ["## Steps", table(["step", "outcome", "seconds", "reason"], [
        [s["name"], s["status"], f"{s['seconds']:.0f}", s["reason"].replace("|", "/")]
        for s in raw["steps"]
    ]), f"Written by `tools/write_gpu_results.py` from `{name}`."]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def write(source: Path) -> str:
    """Writes the page beside the JSON; returns the part to show at once."""
    raw = json.loads(source.read_text())
    source.with_suffix(".md").write_text(render(raw, source.name))
    r = Results(raw)
    return "\n\n".join([requirements(r), faster_family(r), str(source.with_suffix(".md"))])


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: write_gpu_results.py FILE.json")
        return 2
    print(write(Path(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
