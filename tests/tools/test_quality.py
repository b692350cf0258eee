"""benchmarks/quality.py and tools/write_quality.py: exact scores, what is run again, verdicts."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from paths import ROOT, load_script

from ncsn_fast.checkpoints.model_folder import save_table
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.samplers.choices import FAST_ETA, FAST_FINAL, FAST_HISTORY, FAST_STEPS
from ncsn_fast.samplers.table_family import TableFamily

quality = load_script(ROOT / "benchmarks" / "quality.py")
write_quality = load_script(ROOT / "tools" / "write_quality.py")


@pytest.fixture(scope="module")
def mixture():
    return quality.Mixture(0.15)


def test_the_score_is_the_gradient_of_the_log_density(mixture):
    for sigma in (0.02, 0.7, 5.0):
        x = mixture.draw(4, 0).double() + sigma * torch.randn(
            4, *mixture.shape, dtype=torch.float64
        )
        x.requires_grad_()
        variance = mixture.deviation**2 + sigma**2
        gap = (x.flatten(1)[:, None] - mixture.centres).square().sum(2)
        log_density = torch.logsumexp(mixture.weights.log() - gap / (2 * variance), dim=1)
        (gradient,) = torch.autograd.grad(log_density.sum(), x)
        found = sigma * mixture.score(x.detach(), torch.full((len(x),), sigma, dtype=torch.float64))
        torch.testing.assert_close(found, sigma * gradient, rtol=1e-9, atol=1e-9)


def test_figures_of_exact_draws(mixture):
    n = 4000
    figures = mixture.figures(mixture.draw(n, 0))
    expected = sum(math.sqrt(w * (1 - w) / n * 2 / math.pi) for w in mixture.weights.tolist()) / 2
    assert figures["total_variation"] == pytest.approx(expected, rel=0.6)
    assert figures["variance_ratio"] == pytest.approx(1, abs=5 * math.sqrt(2 / (768 * n)))
    assert sum(figures["share"]) == pytest.approx(1)


def test_the_ladder_is_of_the_mixture(mixture):
    distance = torch.cdist(mixture.centres, mixture.centres).max().item()
    ladder = mixture.model.sigmas
    assert ladder[0].item() == pytest.approx(distance, rel=1e-6)
    assert ladder[-1].item() == pytest.approx(0.01)
    assert mixture.centres.shape == (10, 768)
    assert torch.pdist(mixture.centres).min() > 2


def test_more_noise_finds_the_weights(mixture):
    """The data's mean is not the prior's: the flow draws wrong weights, eta = 3 does not."""
    n, found = 400, {}
    for eta in (0.0, 3.0):
        x, nfe = mixture.sample(quality.Row("dpmpp", 20, {"eta": eta}), 0, n)
        found[eta] = mixture.figures(x)
        assert nfe == 20
        assert found[eta]["variance_ratio"] == pytest.approx(1, abs=0.1)
    assert found[0.0]["total_variation"] > 0.1 > found[3.0]["total_variation"]


def test_rows_differ():
    keys = [json.dumps([r.method, r.steps, r.options]) for r in quality.ROWS]
    assert len(set(keys)) == len(keys)


def test_digits_have_the_seeds_of_the_row_and_mixtures_all():
    found = quality.missing([], list(quality.DATA), None, 1000)
    seeds = {}
    for r in found:
        seeds.setdefault((r["data"], r["method"], r["steps"]), set()).add(r["seed"])
    assert seeds["digits", "ald", None] == set(range(5))
    assert seeds["mixture-0.05", "cas", None] == set(range(10))
    assert seeds["digits", "cas", None] == {0}
    of_mnist = {key[1:]: chosen for key, chosen in seeds.items() if key[0] == "mnist"}
    assert {method for method, _ in of_mnist} == {"ald", "fast"}
    assert of_mnist["ald", None] == set(range(5))
    assert of_mnist["fast", 10] == {0}
    assert seeds["digits", "fast", None] == {*range(10, 15), *range(15, 21)}  # tuned, default
    assert quality.missing(found, list(quality.DATA), None, 1000) == []
    rows = quality.rows_of("digits")
    wanted = sum(r.seeds for r in rows if r.has("digits", r.first))
    assert len(quality.missing(found, ["digits"], None, 10)) == wanted


def test_tuned_tables_are_judged_on_the_digits_alone(tmp_path, monkeypatch):
    row, default = quality.TUNED, quality.Row("fast", 3)
    assert [row.has("digits", seed) for seed in (9, 10, 14, 15)] == [False, True, True, False]
    assert not row.has("mixture-0.05", 5)
    fitted = quality.Row("fast", 10, {"table": "tuned-mixture-0.05"})
    kinds = ("digits", "mnist", "mixture-0.05", "mixture-0.15")
    assert [fitted.has(kind, 0) for kind in kinds] == [False, False, True, True]
    fitted = quality.Row("fast", 8, {"table": "tuned-digits-8"})
    assert [fitted.has(kind, 0) for kind in kinds] == [True, False, False, False]
    assert write_quality.label([{"method": "fast", "steps": None, "options": row.options}]) == (
        "`fast` tuned"
    )
    with pytest.raises(ValueError, match=r"has no fast_table.json; run python"):
        quality.tuned_table(tmp_path)
    digits = quality.of_digits()
    ladder = digits.sampler.model.sigmas.double().numpy()
    table = TableFamily(last=4.0).table(ladder, 3, (1, 16, 16))
    save_table(table, tmp_path)
    digits.table = quality.tuned_table(tmp_path)
    assert digits.table == table
    found = {name: digits.sample(r, 0, 2) for name, r in (("tuned", row), ("default", default))}
    assert [nfe for _, nfe in found.values()] == [3, 3]
    assert not torch.equal(found["tuned"][0], found["default"][0])
    monkeypatch.setattr(quality, "of_digits", lambda table=None: digits)
    out = tmp_path / "judged.json"
    quality.main(["--out", str(out), "--tuned", str(tmp_path), "--n", "10", "--seeds", "10"])
    (record,) = json.loads(out.read_text())["records"]
    assert (record["nfe"], record["seed"], record["options"]) == (3, 10, {"table": "tuned"})


def test_a_table_is_fitted_to_a_mixture(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = load_script(ROOT / "benchmarks" / "tune_mixture.py")
    monkeypatch.setattr(script, "SAMPLES", 4)
    table = TunedTable.from_dict(json.loads(script.fit(0.15, candidates=0, references=10)))
    assert (table.steps, table.shape) == (10, (3, 16, 16))
    assert "nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize("deviation", [0.05, 0.15])
def test_tables_of_mixtures_are_judged_on_both(mixture, deviation):
    name = f"tuned-mixture-{deviation:g}"
    x, nfe = mixture.sample(quality.Row("fast", 10, {"table": name}), 0, 2)
    default, _ = mixture.sample(quality.Row("fast", 10), 0, 2)
    assert nfe == quality.table_of(name).steps == 10
    assert x.shape == default.shape
    same = torch.allclose(x, default, atol=1e-4)
    assert same == (deviation == 0.15)  # where tune found nothing better


def test_points_are_compared_on_a_mixture(mixture, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = load_script(ROOT / "benchmarks" / "fit_fast.py")
    monkeypatch.setattr(script, "SAMPLES", 3)
    found = script.of_mixture(mixture, 3, TableFamily())
    assert {name: len(values) for name, values in found.items()} == {
        "total_variation": 6, "variance_ratio": 6,
    }  # fmt: skip
    x, _ = mixture.sample(quality.Row("fast", 3), 100, 3)
    assert found["variance_ratio"][0] == round(mixture.figures(x)["variance_ratio"], 4)


def test_only_what_is_missing_is_run(tmp_path, monkeypatch, capsys):
    rows = [quality.Row("dpmpp", 2, seeds=2), quality.Row("cas", 3), quality.Row("no-such")]
    monkeypatch.setattr(quality, "ROWS", rows)
    monkeypatch.setattr(quality, "MIXTURE_SEEDS", (0, 1))
    out = tmp_path / "results" / "quality.json"
    call = ["--out", str(out), "--data", "mixture-0.15", "--n", "5"]
    assert quality.main([*call, "--only", "cas"]) == 0
    first = json.loads(out.read_text())["records"]
    assert [(r["method"], r["nfe"], r["seed"]) for r in first] == [("cas", 3, 0), ("cas", 3, 1)]
    capsys.readouterr()
    quality.main(call)
    printed = capsys.readouterr().out
    assert "no-such: no such method in this version; left out" in printed
    assert '"cas"' not in printed
    second = json.loads(out.read_text())["records"]
    assert second[:2] == first
    assert [(r["method"], r["seed"]) for r in second[2:]] == [("dpmpp", 0), ("dpmpp", 1)]
    before = out.stat().st_mtime_ns
    quality.main(call)
    assert out.stat().st_mtime_ns == before


FIGURES = {
    "n": 1000, "class_share": [0.1] * 8 + [0.08, 0.12], "recognised": 0.92,
    "held_out_accuracy": 0.99, "frechet": 0.1, "frechet_train": 0.06, "nearest_train": 1.73,
    "nearest_train_held_out": 1.75, "copies": 0.008,
}  # fmt: skip


def record(method, seed=0, nfe=30, data="digits", **changed):
    figures = {**copy.deepcopy(FIGURES), **changed}
    if data != "digits":
        figures = {"total_variation": 0.03, "variance_ratio": 1.1, **changed}
    return {"data": data, "method": method, "steps": None, "options": {}, "seed": seed,
            "n": 1000, "nfe": nfe, "seconds": 1.0, "figures": figures}  # fmt: skip


# recognised .91 and .93: sd .01414, so ald's band is .92 -+ .02828, .05828 from real digits' .95
MARK = [record("ald", s, 246, recognised=r) for s, r in enumerate([0.91, 0.93])]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"recognised": 0.8918}, []),
        ({"recognised": 0.8916}, ["recognised"]),
        ({"recognised": 0.99}, []),
        ({"frechet": 0.07, "copies": 0.01, "nearest_train": 1.74}, []),
        ({"frechet": 0.1001}, ["frechet"]),
        ({"copies": 0.0121}, ["copies"]),
        ({"nearest_train": 1.72}, ["nearest"]),
        ({"nearest_train": 1.78}, ["nearest"]),
        ({"class_share": [0.1] * 8 + [0.07, 0.13]}, ["rarest", "commonest"]),
        ({"class_share": [0.1] * 10}, []),
    ],
)
def test_as_good_means_no_farther_from_real_data(changed, missed):
    assert write_quality.misses([record("x", **changed)], MARK) == missed


def test_mnist_is_left_out_without_its_images(tmp_path, capsys):
    out = tmp_path / "none.json"
    assert quality.main(["--out", str(out), "--data", "mnist", "--n", "10"]) == 0
    assert "mnist: needs --mnist, a folder of its IDX files, and its model" in (
        capsys.readouterr().out
    )
    assert not out.exists()


def test_a_model_with_two_seeds_of_ald_has_a_table_and_the_last_has_the_plot():
    mnist = [{**r, "data": "mnist"} for r in records() if r["data"] == "digits"]
    assert write_quality.models_of([*records(), *mnist[:1]]) == ["digits"]
    both = [*records(), *mnist]
    assert write_quality.models_of(both) == ["mnist", "digits"]
    text = write_quality.block(both)
    assert text.index("| `mnist` | evaluations") < text.index("| `digits` | evaluations")
    assert "mnist" not in write_quality.mixture_table(both)


@pytest.mark.parametrize(("ratio", "missed"), [(0.95, []), (0.85, ["variance_ratio"])])
def test_variance_may_miss_on_either_side(ratio, missed):
    mark = [record("ald", s, 451, "mixture-0.05", variance_ratio=1.1) for s in range(2)]
    assert (
        write_quality.misses([record("x", 0, 30, "mixture-0.05", variance_ratio=ratio)], mark)
        == missed
    )


def test_one_seed_has_no_spread():
    with pytest.raises(ValueError, match="ald needs two seeds or more"):
        write_quality.band(MARK[:1], "recognised")


def records():
    mixtures = [
        record(m, s, n, "mixture-0.05", total_variation=t)
        for m, s, n, t in [("ald", 0, 451, 0.03), ("ald", 1, 451, 0.04), ("cas", 0, 90, 0.09)]
    ]
    return [record("cas", nfe=49, recognised=0.7), *MARK, record("fast"), *mixtures]


POINT = {
    "rows": 15, "bend": [1.0, 1.0], "eta": [2.0, 5.0], "history": [1.2], "final": 0.2,
    "figures": {
        "mnist8": {
            "recognised": [0.7, 0.72], "frechet": [0.05], "classes": [0.1], "nearest": [0.6],
        },
        "mixture-0.1": {"total_variation": [0.04, 0.06], "variance_ratio": [1.0, 1.0]},
    },
}  # fmt: skip


def test_the_docs_tell_the_default_of_fast():
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| **`fast`** |")]
    assert f"by a table of {FAST_STEPS} rows" in row
    assert f"| **{FAST_STEPS}** |" in row
    assert FAST_ETA == (2.0, 5.0, 7.0, 7.0)
    told = " ".join((ROOT / "docs" / "quality.md").read_text().split())
    assert "eta 2 at the first row, 5, and 7 from two thirds of the rows on" in told
    first, middle, last = FAST_HISTORY
    assert f"weight of the history {first}, {middle} and {last}; {FAST_FINAL} in the step" in told


def test_table_of_the_fit():
    head, _, row = write_quality.fit_table([POINT]).splitlines()
    assert head.endswith("| nearest image | deviation 0.1 |")
    assert row == (
        "| 15 | 1, 1 | 2, 5 | 1.2 | 0.2 | 71.0 ± 1.0 | 0.050 | 0.100 | 0.600 "
        "| 0.050 ± 0.010, 1.00 ± 0.00 |"
    )


def test_tables():
    first, second = write_quality.digits_table(records()), write_quality.mixture_table(records())
    rows = [line.split(" | ") for line in first.splitlines()[2:]]
    assert [r[0] for r in rows[:3]] == ["| `ald`", "| `fast`", "| `cas`"]
    assert [r[-1] for r in rows[:3]] == ["the mark |", "**yes** |", "no: recognised |"]
    assert rows[0][1:4] == ["246", "92.0 ± 1.0", "0.100 ± 0.000"]
    assert rows[2][2] == "70.0"  # one seed has no error
    assert rows[0][-2] == "2 x 1000"
    assert second.splitlines()[2] == ("| `ald` | 451 | 0.035 ± 0.005, 1.10 ± 0.00 | the mark |")
    assert second.splitlines()[3] == "| `cas` | 90 | 0.090, 1.10 | no: modes |"


def test_readme_and_plot(tmp_path, monkeypatch, capsys):
    readme, plot, results = (tmp_path / n for n in ("README.md", "quality.png", "quality.json"))
    for name, path in (("PAGE", readme), ("PLOT", plot), ("RESULTS", results)):
        monkeypatch.setattr(write_quality, name, path)
    monkeypatch.setattr(write_quality, "ROOT", tmp_path)
    readme.write_text(
        "before\n<!-- quality:begin -->\nold\n<!-- quality:end -->\nafter\n"
        "<!-- fit:begin --><!-- fit:end -->"
    )
    with pytest.raises(FileNotFoundError, match=r"run benchmarks/quality\.py first"):
        write_quality.write(check=True)
    results.write_text(json.dumps({"records": records()}))
    fit = tmp_path / "fit.json"
    fit.write_text(json.dumps([POINT]))
    monkeypatch.setattr(write_quality, "FIT", fit)
    assert write_quality.write(check=True) == ["README.md", "quality.png"]
    assert "old" in readme.read_text()
    assert write_quality.write(check=False) == ["README.md"]
    assert write_quality.write(check=True) == []
    text = readme.read_text()
    assert text.startswith("before\n<!-- quality:begin -->\n![Quality")
    assert (
        f"<!-- quality:end -->\nafter\n<!-- fit:begin -->\n{write_quality.fit_table([POINT])}"
        in text
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    readme.write_text("no markers")
    monkeypatch.setattr("sys.argv", ["write_quality.py"])
    assert write_quality.main() == 1
    assert "must hold the lines <!-- quality:begin -->" in capsys.readouterr().out
