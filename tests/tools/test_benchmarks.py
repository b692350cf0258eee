"""The machinery of benchmarks/: races on a fake clock, and the table and plot made from a result.

That the benchmarks themselves run is what `test_readme.py` tests, on small networks.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal
from paths import ROOT, load_script

from ncsn_fast import load
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.choices import FAST_STEPS

pytest_plugins = ["pytester"]
race = load_script(ROOT / "benchmarks" / "race.py")
write_results = load_script(ROOT / "tools" / "write_results.py")
two_commits = load_script(ROOT / "benchmarks" / "two_commits.py")


class Track:
    """Entrants that take given times on a clock that only they move, and what was run when."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.log = 0.0, list[str]()
        self.seconds = seconds

    def run(self, name: str) -> None:
        self.log.append(name)
        self.now += self.seconds[name]

    def builders(self, **errors: float) -> dict[str, Any]:
        return {
            name: lambda name=name: race.Entrant(
                functools.partial(self.run, name), lambda: errors.get(name, 0.0), 1e-3
            )
            for name in self.seconds
        }

    def race(self, pace: Any, **errors: float) -> dict[str, Any]:
        return race.race(self.builders(**errors), pace, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting what all other tests have left behind takes longer than a race on a fake clock."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_everyone_gets_its_own_times() -> None:
    track = Track(a=1.0, b=0.25, c=3.0)
    results = track.race(race.Pace(seconds=0, fewest=7))
    assert {name: result.laps for name, result in results.items()} == {
        "a": [1.0] * 7, "b": [0.25] * 7, "c": [3.0] * 7,
    }  # fmt: skip


def test_rounds_are_interleaved_and_their_order_changes() -> None:
    track = Track(a=1.0, b=1.0, c=1.0)
    track.race(race.Pace(seconds=0, fewest=6, lead_in=0))
    laps = track.log[-18:]
    rounds = ["".join(laps[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_every_place_is_taken_equally_often(n: int) -> None:
    names = [str(i) for i in range(n)]
    for places in zip(*race.orders(names, 2 * n), strict=True):
        assert sorted(places) == sorted(names * 2)


def test_each_short_lap_follows_an_untimed_run_of_the_same_entrant() -> None:
    track = Track(a=0.1, b=0.1, long=1.0)
    track.race(race.Pace(seconds=0, fewest=2))
    assert track.log[-10:] == ["a", "a", "b", "b", "long", "long", "b", "b", "a", "a"]


def test_rounds_fill_the_time_within_their_bounds() -> None:
    def rounds(seconds: float, **bounds: int) -> int:
        pace = race.Pace(seconds=seconds, lead_in=0, **bounds)
        return len(Track(a=1.0, b=4.0).race(pace)["a"].laps)

    assert rounds(50.0) == 10
    assert rounds(1.0, fewest=5) == 5
    assert rounds(500.0, most=8) == 8


def test_short_calls_are_repeated_within_a_lap() -> None:
    result = Track(a=race.SHORTEST_LAP / 64).race(race.Pace(seconds=0, fewest=5))["a"]
    assert result.iterations == 64
    assert result.laps == pytest.approx([race.SHORTEST_LAP] * 5)


@pytest.mark.parametrize("error", [2e-3, math.nan, math.inf])
def test_a_wrong_result_is_not_timed(error: float) -> None:
    track = Track(good=1.0, wrong=1.0)
    results = track.race(race.Pace(seconds=0), wrong=error)
    assert "wrong" not in track.log
    assert results["wrong"].laps == []
    with pytest.raises(AssertionError, match="wrong differs from the reference by"):
        raise results["wrong"].failure
    assert len(results["good"].laps) == 5
    assert results["good"].info["relative_error"] == 0.0


def test_an_absent_provider_keeps_its_reason() -> None:
    def absent() -> Any:
        raise race.Absent("package x is missing")

    track = Track(a=1.0)
    results = race.race(
        {**track.builders(), "x": absent}, race.Pace(seconds=0), clock=lambda: track.now
    )
    assert isinstance(results["x"].failure, race.Absent)
    assert results["a"].laps


def test_relative_error() -> None:
    x = torch.tensor([3.0, 4.0])
    assert race.relative_error(x + torch.tensor([0.0, 0.5]), x) == pytest.approx(0.1)
    assert math.isnan(race.relative_error(x * math.nan, x))


SUITE = """
    import pytest
    from race import Absent, Entrant

    def entrant(name):
        if name == "absent":
            raise Absent("package x is missing")
        return Entrant(lambda: None, lambda: float(name == "wrong"), 0.5, {"colour": "red"})

    @pytest.mark.parametrize("provider", ["a", "wrong", "absent", "b"])
    def bench_x(race, provider):
        builders = lambda settings: {n: (lambda n=n: entrant(n)) for n in settings.names}
        race(builders, "the group", seconds=0)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with our conftest, and a benchmark of four providers."""
    for name in ("race.py", "conftest.py"):
        pytester.path.joinpath(name).write_text((ROOT / "benchmarks" / name).read_text())
    pytester.path.joinpath("bench_x.py").write_text(SUITE.replace("\n    ", "\n"))
    ini = (ROOT / "benchmarks" / "pytest.ini").read_text()
    pytester.path.joinpath("pytest.ini").write_text(ini)
    for name in ("race", "conftest"):  # so that the copies are imported, and gone afterwards
        monkeypatch.delitem(sys.modules, name, raising=False)
    # Their imports take longer than everything else here.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:typeguard -p no:anyio")
    return pytester


def test_results_reach_pytest_benchmark(suite: pytest.Pytester) -> None:
    outcome = suite.runpytest_inprocess("--benchmark-only", "--benchmark-json=out.json")
    outcome.assert_outcomes(passed=2, failed=1, skipped=1)
    outcome.stdout.fnmatch_lines(["*wrong differs from the reference*"])
    raw = json.loads((suite.path / "out.json").read_text())
    a, b = raw["benchmarks"]
    assert (a["param"], b["param"]) == ("a", "b")
    assert len(a["stats"]["data"]) == 5
    assert a["stats"]["data"] != b["stats"]["data"]
    assert a["group"] == "the group"
    assert a["extra_info"]["colour"] == "red"
    assert [n["provider"] for n in raw["not_run"]] == ["wrong", "absent"]
    assert raw["machine_info"]["ncsn_fast"]["versions"]["torch"] == torch.__version__


def test_only_the_selected_race(suite: pytest.Pytester) -> None:
    suite.runpytest_inprocess("--benchmark-only", "-k", "a-nor-wrong or [b]").assert_outcomes(
        passed=1, deselected=3
    )


def test_disabled_runs_once(suite: pytest.Pytester) -> None:
    outcome = suite.runpytest_inprocess("--benchmark-disable")
    outcome.assert_outcomes(passed=2, failed=1, skipped=1)


def record(group: str, provider: str, seconds: float, **info: Any) -> dict[str, Any]:
    dtype = "bf16" if provider.endswith("bf16") else "fp32"
    stats = dict.fromkeys(("q1", "q3", "min", "median", "mean"), seconds)
    return {
        "name": f"bench[{provider}]",
        "group": group,
        "extra_info": {"provider": provider, "dtype": dtype, "flop": 1, **info},
        "stats": {**stats, "rounds": 7, "iterations": 1, "data": [seconds] * 7},
    }


EQUAL = "CIFAR-10, ald against fast, 8 images"
RAW = {
    "datetime": "2026-01-02T03:04:05",
    "commit_info": {"id": "0123456789abcdef"},
    "machine_info": {
        "node": "name-of-the-machine",
        "ncsn_fast": {
            "processor": "Some Processor", "flags": ["avx512f"], "threads": 2,
            "versions": {"torch": "2.13.0", "openvino": None},
        },
    },
    "not_run": [
        {"group": "CIFAR-10 32x32, B = 8", "provider": "ort", "reason": "package x is missing"}
    ],
    "benchmarks": [
        record("CIFAR-10 32x32, B = 8", "published", 1.0, workload="w", peak_rss_mb=900.4),
        record("CIFAR-10 32x32, B = 8", "ours-bf16", 0.2, workload="w", peak_rss_mb=300.2),
        record("CIFAR-10 32x32, B = 8", "convolutions-bf16", 0.16, workload="w"),
        record("Deeper 96x96, B = 1", "ours-bf16", 4.0, workload="w"),
        record("NCSN++ 32x32, B = 1", "published", 3.0, unet="w"),
        record("NCSN++ 32x32, B = 1", "ours-fp32", 2.0, unet="w"),
        record("digits, ald, 8 images", "published", 4.0, images=8),
        record("digits, ald, 8 images", "ours-bf16", 0.5, images=8),
        record(EQUAL, "published", 5.0, batch=8, evaluations=5, nfe=1161, rate="computed"),
        record(EQUAL, "ours-fast-bf16", 4.0, batch=8, evaluations=30, nfe=30, rate="computed"),
        record("training step", "kernel", 0.75),
    ],
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a README and one raw result, which write_results takes for the project's."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(RAW))
    markers = f"{write_results.BEGIN}\nold\n{write_results.END}"
    (tmp_path / "README.md").write_text(f"before\n{markers}\nafter\n")
    monkeypatch.setattr(write_results, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(write_results, "PLOT", tmp_path / "docs" / "benchmarks.png")
    monkeypatch.setattr(write_results, "RESULTS", tmp_path / "results")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["write_results.py", *arguments])
    return write_results.main()


def test_results_are_written_and_checked(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert run(monkeypatch, "--check") == 1
    assert "out of date: cpu.json, README.md" in capsys.readouterr().out
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("before\n<!-- results:begin -->\n| one forward | CIFAR-10")
    assert readme.endswith("<!-- results:end -->\nafter\n")
    for line in (
        "| `published` | 1 s · 1.00x | 900 MB |",
        "| **`ours-bf16`** | 200 ms · 5.00x · 80% | 300 MB |",
        "| **`ours-fp32`** | 2 s · 1.50x |",
        "| `ort` | not run |  |",
        "| **`ours-bf16`** | 4 s |  |",
        "| **`ours-bf16`** | 16/s · 8.00x |",
        # 8 images in 1 s x 1161, and in 4 s
        "| `published` | 0.00689/s · 1.00x · 5 of 1161 |",
        "| **`ours-fast-bf16`** | 2/s · 290x · all 30 |",
        "| `kernel` | 750 ms |",
        "*Not run:* `ort`: package x is missing",
    ):
        assert line in readme.splitlines()
    assert "7 to 7 interleaved rounds; 2026-01-02, commit 012345678" in " ".join(readme.split())
    stripped = (checkout / "results" / "cpu.json").read_text()
    assert "name-of-the-machine" not in stripped
    assert '"data"' not in stripped
    assert (checkout / "docs" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_other_kinds_of_machines_have_tables_below(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    facts: Any = RAW["machine_info"]["ncsn_fast"]
    limits = {"NCSN_FAST_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    other = RAW | {
        "datetime": "2027-01-02T03:04:05",
        "not_run": [],
        "machine_info": {"node": "x", "ncsn_fast": {**facts, "isa": "avx2", "limits": limits}},
        "benchmarks": [
            record("CIFAR-10 32x32, B = 8", "published", 6.0, workload="w"),
            record("CIFAR-10 32x32, B = 8", "ours-bf16", 1.5, workload="w"),
        ],
    }
    raw = checkout / "raw.json"
    raw.write_text(json.dumps(other))
    assert run(monkeypatch, str(raw)) == 0
    file = checkout / "results" / "cpu-some-limited-to-avx2.json"
    assert '"node"' not in file.read_text()
    assert write_results.newest().name == "cpu.json"
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    page = (checkout / "README.md").read_text()
    first, _, second = page.partition("### Some Processor, limited to avx2")
    assert "| **`ours-bf16`** | 200 ms · 5.00x · 80% |" in first
    assert "limited by" not in first
    assert "| **`ours-bf16`** | 1.5 s · 4.00x |" in second
    words = " ".join(second.split())
    assert "limited by `NCSN_FAST_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2`; threads: 2" in words
    assert "To repeat it:* `make bench-avx2`" in words


def test_a_changed_figure_is_noticed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert run(monkeypatch) == 0
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("5.00x", "6.00x"))
    assert run(monkeypatch, "--check") == 1


def test_a_later_run_replaces_its_groups(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    title = "CIFAR-10 32x32, B = 8"
    later = RAW | {
        "commit_info": {"id": "fedcba9876543210"},
        "not_run": [],
        "benchmarks": [
            record(title, "published", 2.0, workload="w"),
            record(title, "ours-bf16", 0.1, workload="w"),
            record(title, "convolutions-bf16", 0.2, workload="w"),
        ],
    }
    first, second = checkout / "results" / "cpu.json", checkout / "later.json"
    second.write_text(json.dumps(later))
    assert run(monkeypatch, str(first), str(second)) == 0
    assert run(monkeypatch, "--check") == 0
    readme = (checkout / "README.md").read_text()
    assert "| **`ours-bf16`** | 100 ms · 20.00x · 200% |  |" in readme
    assert "| **`ours-bf16`** | 16/s · 8.00x |" in readme
    others = f"Deeper 96x96, B = 1, NCSN++ 32x32, B = 1, digits, ald, 8 images, {EQUAL}"
    caption = f"commit fedcba987; commit 012345678 for {others}"
    assert caption in " ".join(readme.split())
    limited = {**RAW["machine_info"]["ncsn_fast"], "limits": {}}  # older files do not say it
    second.write_text(json.dumps({**later, "machine_info": {"ncsn_fast": limited}}))
    assert run(monkeypatch, str(first), str(second)) == 0
    other = {**later, "machine_info": {"ncsn_fast": {**RAW["machine_info"]["ncsn_fast"], "x": 1}}}
    second.write_text(json.dumps(other))
    assert run(monkeypatch, str(first), str(second)) == 1


def test_every_kind_of_machine_has_a_file_and_its_place_on_the_page(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    info = {**RAW["machine_info"]["ncsn_fast"], "flags": ["avx512f", "amx_bf16"]}
    info["processor"] = "Intel(R) Xeon(R) Platinum 8500C CPU @ 2.50GHz"
    title = "CIFAR-10 32x32, B = 8"
    other = RAW | {
        "datetime": "2025-01-02T03:04:05",
        "machine_info": {"node": "name-of-another", "ncsn_fast": info},
        "benchmarks": [
            record(title, "published", 3.0, workload="w"),
            record(title, "ours-bf16", 0.1, workload="w"),
            record(title, "convolutions-bf16", 0.1, workload="w"),
        ],
    }
    assert run(monkeypatch) == 0
    (raw := checkout / "bench.json").write_text(json.dumps(other))
    assert run(monkeypatch, str(raw)) == 0
    kept = checkout / "results" / "cpu-intel-xeon-platinum-8500c-amx-bf16.json"
    assert "name-of-another" not in kept.read_text()
    assert run(monkeypatch, "--check") == 0
    readme = (checkout / "README.md").read_text()
    first, second = "Some Processor, avx512f", f"{info['processor']}, amx_bf16"
    assert f"| one forward | {title}, {first} | {title}, {second} |" in readme
    assert "| **`ours-bf16`** | 200 ms · 5.00x · 80% | 100 ms · 30.00x · 100% |" in readme
    assert "| `ort` | not run | not run |" in readme
    headings = [line for line in readme.splitlines() if line.startswith("### ")]
    assert headings == [f"### {first}", f"### {second}"]  # the latest first
    limits = {
        **RAW["machine_info"]["ncsn_fast"],
        "limits": {"NCSN_FAST_ISA": "avx2"},
        "isa": "avx2",
    }
    limited = {"datetime": "2027-01-02T03:04:05", "machine_info": {"ncsn_fast": limits}}
    raw.write_text(json.dumps(RAW | limited))
    assert run(monkeypatch, str(raw)) == 0
    assert (checkout / "results" / "cpu-some-limited-to-avx2.json").exists()
    readme = (checkout / "README.md").read_text()
    assert readme.index("### Some Processor, limited to avx2") > readme.index(f"### {second}")
    assert "limited by `NCSN_FAST_ISA=avx2`; threads: 2" in " ".join(readme.split())
    raw.write_text(json.dumps(RAW))
    assert run(monkeypatch, str(raw)) == 0
    assert (checkout / "results" / "cpu-some-avx512f.json").exists()


def test_the_part_that_is_timed_is_the_first_rows_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    works = load_script(ROOT / "benchmarks" / "bench_sampling.py").WORKS
    cifar10, digits = works["cifar10"], works["digits"]
    ald, fast = (cifar10.task(method, small=False) for method in ("ald", "fast"))
    whole = methods.build("ald", ald.model, None, {})
    # 232 levels of 5 steps and a denoising one
    assert (ald.program.nfe, ald.nfe) == (5, 1161) == (5, whole.nfe)
    assert (fast.program.nfe, fast.nfe) == (FAST_STEPS, FAST_STEPS)
    tuned = load("digits").tuned
    assert tuned is not None
    assert digits.task("fast", small=False).nfe == FAST_STEPS  # the default table
    assert digits.task("tuned", small=False).nfe == tuned.steps < FAST_STEPS
    assert cifar10.task("tuned", small=False).nfe == tuned.steps
    for column in ("sigma", "level", "a", "b", "c", "g", "p", "q"):
        assert_array_equal(getattr(ald.program, column), getattr(whole.head(5), column))


@pytest.mark.parametrize("text", ["no markers", f"{write_results.END}{write_results.BEGIN}"])
def test_missing_markers_are_said(
    text: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "README.md").write_text(text)
    assert run(monkeypatch) == 1
    assert "<!-- results:begin -->" in capsys.readouterr().out
    assert (checkout / "README.md").read_text() == text


def test_no_results_are_said(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_results, "ROOT", checkout)
    (checkout / "results" / "cpu.json").unlink()
    assert run(monkeypatch) == 1
    assert "no cpu*.json in results" in capsys.readouterr().out


# Two commits -------------------------------------------------------------------------------------


def test_ratios_of_two_commits_are_those_of_their_rounds() -> None:
    result = two_commits.summary({"before": [2.0, 8.0, 6.0], "after": [1.0, 2.0, 2.0]})
    assert (result["rounds"], result["before"], result["after"]) == (3, 6.0, 2.0)
    assert (result["ratio_q1"], result["ratio"], result["ratio_q3"]) == (2.0, 3.0, 4.0)


@pytest.mark.slow
def test_two_commits_take_turns() -> None:
    case = ["ncsnv2", {"ngf": 8}, [1, 8, 8], 2, "fp32", 1]
    result = two_commits.compare(ROOT, ROOT, case, rounds=3)
    assert result["rounds"] == 3
    assert min(result["before"], result["after"]) > 0


def test_two_commits_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter([1.0, 1.1])

    class Fake:
        def __init__(self, root: Path, case: list[Any]) -> None:
            self.norm = next(norms)

        def read(self) -> list[float]:
            return [0.0, self.norm]

    monkeypatch.setattr(two_commits, "Worker", Fake)
    with pytest.raises(SystemExit, match="different scores"):
        two_commits.compare(ROOT, ROOT, [], rounds=1)
