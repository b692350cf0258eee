"""Tables of speed from stripped results: a row per provider, a column per race."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BASES, FLOOR = ("published", "eager"), "convolutions-{dtype}"  # the first of BASES that was run

Record = dict[str, Any]
Cell = Callable[[Record, dict[str, Record]], str]


def groups(results: dict[str, Any], kind: str) -> dict[str, dict[str, Record]]:
    """Returns group -> provider -> record, of benchmarks whose extra_info has the key `kind`."""
    found: dict[str, dict[str, Record]] = {}
    for record in results["benchmarks"]:
        if kind in record["extra_info"]:
            provider = record["extra_info"]["provider"]
            found.setdefault(record["group"], {})[provider] = record
    return found


def median(record: Record) -> float:
    return float(record["stats"]["median"])


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _base(group: dict[str, Record]) -> Record | None:
    """Returns the record that the others are compared with."""
    return next((group[name] for name in BASES if name in group), None)


def _faster(record: Record, group: dict[str, Record]) -> str:
    """Returns the speedup over the published code, if that was run too."""
    base = _base(group)
    return "" if base is None else f" · {median(base) / median(record):.2f}x"


def forward_cell(record: Record, group: dict[str, Record]) -> str:
    """Formats time, ratio, and the time share of the convolutions alone in that dtype."""
    floor = group.get(FLOOR.format(dtype=record["extra_info"]["dtype"]))
    share = "" if floor is None else f" · {median(floor) / median(record):.0%}"
    return _seconds(median(record)) + _faster(record, group) + share


def images_cell(record: Record, group: dict[str, Record]) -> str:
    """Formats images per second and the ratio."""
    rate = record["extra_info"]["images"] / median(record)
    return f"{rate:.3g}/s{_faster(record, group)}"


def rate_cell(record: Record, group: dict[str, Record]) -> str:
    """Formats images per second of whole samplings, the ratio, and the timed evaluations."""

    def rate(of: Record) -> float:
        info = of["extra_info"]
        return float(info["batch"] * info["evaluations"] / (median(of) * info["nfe"]))

    ratio = ""
    if base := _base(group):
        ratio = f" · {rate(record) / rate(base):#.3g}".rstrip(".") + "x"
    timed, nfe = record["extra_info"]["evaluations"], record["extra_info"]["nfe"]
    return f"{rate(record):.3g}/s{ratio} · {f'all {nfe}' if timed == nfe else f'{timed} of {nfe}'}"


def step_cell(record: Record, group: dict[str, Record]) -> str:
    """Formats time and ratio."""
    return _seconds(median(record)) + _faster(record, group)


def table(
    title: str,
    columns: dict[str, dict[str, Record]],
    cell: Cell,
    not_run: list[dict[str, str]],
    *,
    memory: bool = False,
) -> str:
    """Returns a markdown table: a row per provider, a column per group.

    With `memory`, adds the peak memory of the last group.
    """
    rows = list(dict.fromkeys(name for group in columns.values() for name in group))
    rows += [n["provider"] for n in not_run if n["group"] in columns]
    header = [title, *columns, *(["peak memory"] if memory else [])]
    lines = [_row(header), _row(["---"] * len(header))]
    for name in dict.fromkeys(rows):
        cells = [cell(group[name], group) if name in group else "not run"
                 for group in columns.values()]  # fmt: skip
        if memory:
            last = list(columns.values())[-1]
            peak = last[name]["extra_info"].get("peak_rss_mb") if name in last else None
            cells.append("" if peak is None else f"{peak:.0f} MB")
        label = f"**`{name}`**" if name.startswith("ours") else f"`{name}`"
        lines.append(_row([label, *cells]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def side_by_side(machines: dict[str, dict[str, Any]]) -> str:
    """Returns a table of one forward on several machines: a row per provider, a column for each.

    Columns are the CIFAR-10 groups, each on every machine that ran it.
    """
    of = {name: groups(results, "workload") for name, results in machines.items()}
    titles = dict.fromkeys(g for found in of.values() for g in found if g.startswith("CIFAR-10"))
    columns = {
        f"{title}, {name}": found[title]
        for title in titles
        for name, found in of.items()
        if title in found
    }
    not_run = [
        {"provider": n["provider"], "group": f"{n['group']}, {name}"}
        for name, results in machines.items()
        for n in results["not_run"]
    ]
    return table("one forward", columns, forward_cell, not_run)


def tables(results: dict[str, Any]) -> list[str]:
    """Returns all tables that the results have rows for."""
    networks, not_run = groups(results, "workload"), results["not_run"]
    small = {g: r for g, r in networks.items() if g.startswith("CIFAR-10")}
    large = {g: r for g, r in networks.items() if g not in small}
    sampling = groups(results, "images")
    training = {g: r for g, r in groups(results, "dtype").items() if g.startswith("training")}
    wanted: list[tuple[str, dict[str, dict[str, Record]], Cell, bool]] = [
        ("one forward", small, forward_cell, True),
        ("one forward", large, forward_cell, True),
        ("one forward", groups(results, "unet"), forward_cell, False),
        ("sampling", sampling, images_cell, False),
        ("sampling", groups(results, "rate"), rate_cell, False),
        ("training", training, step_cell, False),
    ]
    return [
        table(title, columns, cell, not_run, memory=memory)
        for title, columns, cell, memory in wanted
        if columns
    ]
