"""Quality of samples against network evaluations: every method, compared with annealed Langevin.

`python benchmarks/quality.py --out benchmarks/results/quality.json` draws the rows that the file
does not hold yet, so an interrupted run can simply be restarted. `--only fast cas` selects methods,
`--data mixture` a kind of data. `python tools/write_quality.py` makes plot and table.
`--tuned FOLDER` judges the table of a digits model that was tuned, before it ships. Other tables
that were fitted lie beside the results, `tuned-DATA-ROWS.json` of a model and, of a mixture, what
tune_mixture.py wrote: each of these is judged on both mixtures. The rows of
mnist, where that model ships, need `--mnist FOLDER`, its four IDX files, beside which samples are
judged; without it they are left out.

There are two kinds of data. The shipped models are evaluated by the figures of their model cards.
A mixture with a known exact score is evaluated by errors that a learnt score would hide: the
weights of its modes, and the variance within them.

A method is as good as `ald` if no figure, averaged over its seeds, is farther from that of real
data than ald's range: the mean over ald's seeds, plus or minus two of their standard deviations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsn_fast import Sampler, load
from ncsn_fast.checkpoints.model_folder import TABLE_NAME, read_table
from ncsn_fast.checkpoints.shipped import shipped
from ncsn_fast.data import datasets
from ncsn_fast.data.files import atomic_write
from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.parameterisation import standard
from ncsn_fast.evaluation.classifier_figures import RealDigits
from ncsn_fast.evaluation.features import load_extractor
from ncsn_fast.evaluation.metrics import DigitFigures, digit_figures
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.procedure import Procedure
from ncsn_fast.samplers.program import Chains, initial_state, run

Record = dict[str, Any]
SEEDS, MIXTURE_SEEDS, LAST_SEED = tuple(range(5)), tuple(range(10)), 100
TABLES = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """Point of the plot: a method, its options and its number of seeds.

    Seeds, from `first` on, apply to the models; a mixture is cheap, so every row has ten seeds
    there. Of mnist, whose samples cost ten times those of the digits, there are ald and fast.
    The default of `fast` was chosen on other data (fit_fast.py), `fast` with eta 4 chosen on
    samples of seeds 100 and above: their rows use seeds that no choice was based on.
    """

    method: str
    steps: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 1
    first: int = 0

    @property
    def table(self) -> str | None:
        """Name of the fitted table that the row runs: "tuned" for the model's own, or of a file."""
        return self.options.get("table")

    def has(self, kind: str, seed: int) -> bool:
        """Returns whether the row includes this seed for this kind of data."""
        of_mixture = kind not in MODELS
        if self.table is not None and of_mixture != ("mixture" in self.table):
            return False
        if of_mixture:
            return seed in MIXTURE_SEEDS
        if kind != "digits" and (
            self.method not in ("ald", "fast") or self.table not in (None, "tuned")
        ):
            return False
        return self.first <= seed < self.first + self.seeds


# Seeds 5 to 9 judged a table that the same search had found earlier, and missed by one figure.
TUNED = Row("fast", None, {"table": "tuned"}, seeds=len(SEEDS), first=2 * len(SEEDS))
ROWS = [
    Row("ald", seeds=len(SEEDS)),
    Row("fast", seeds=6, first=3 * len(SEEDS)),
    *[Row("fast", n, {"table": f"tuned-digits-{n}"}, seeds=5, first=20) for n in (8,)],
    *[Row("fast", 10, {"table": f"tuned-mixture-{d}"}) for d in ("0.05", "0.15")],
    *[Row("fast", n) for n in (10, 30)],
    Row("fast", 30, {"eta": 4.0}, seeds=len(SEEDS), first=len(SEEDS)),
    *[Row("fast", n, {"eta": 4.0}, seeds=3) for n in (20, 24)],
    *[Row("fast", n, {"eta": 4.0}, seeds=len(SEEDS), first=len(SEEDS)) for n in (12, 15)],
    *[Row("fast", n, {"eta": 4.0}) for n in (10, 40)],
    Row("cas"),
    Row("cas", 25),
    *[Row("dpmpp", n) for n in (10, 20, 30)],
    Row("dpmpp", 20, {"eta": 0.0}),
    Row("heun"),
    Row("heun", 15, {"churn": 5.0}),
    Row("euler"),
    Row("ancestral"),
    Row("reverse"),
    Row("pc"),
    Row("ode"),
    Row("em"),
    *[Row("adaptive", None, {"rtol": rtol}) for rtol in (0.02, 0.1)],
]


class Mixture:
    """Mixture of ten Gaussians around digits in 768 dimensions, with its exact score.

    The centres are a training digit of each class (the first, or another: `which`), whose three
    channels are upright, mirrored and upside down; weights are k / 55, k = 1..10; each mode is
    N(centre, deviation^2 I). The noise levels and the Langevin step are derived from the centres by
    Techniques 1, 2 and 4.
    """

    shape = (3, 16, 16)

    def __init__(self, deviation: float, which: int = 0) -> None:
        images, labels = datasets.digits("train", self.shape[-1])
        first = torch.stack([images[labels == k][which] for k in range(10)]) / 255
        centres = torch.cat([first, first.flip(-1), first.flip(-2)], dim=1)
        self.centres, self.deviation = centres.flatten(1).double(), deviation
        self.weights = torch.arange(1.0, 11.0, dtype=torch.float64) / 55
        self.table: TunedTable | None = None  # of rows with the table "tuned"
        ladder = schedule.derive(centres)
        self.model = SimpleNamespace(  # the attributes of a ScoreModel that methods use
            sigmas=torch.from_numpy(
                np.geomspace(ladder.sigma_begin, ladder.sigma_end, ladder.n_sigmas)
            ),
            conditional=False,
            tuned=None,
            parameterisation=standard("score", sees="nothing"),
            config=SimpleNamespace(epsilon=ladder.epsilon, n_steps_each=5, langevin_form="code"),
        )

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Computes the score of the mixture noised to sigma (N,), at x (N, 3, 16, 16); float32."""
        variance, flat = self.deviation**2 + sigma.double()[:, None] ** 2, x.flatten(1).double()
        logits = (flat @ self.centres.T - self.centres.square().sum(1) / 2) / variance
        mean = torch.softmax(logits + self.weights.log(), dim=1) @ self.centres
        return ((mean - flat) / variance).to(x.dtype).reshape(x.shape)

    def draw(self, n: int, seed: int) -> Tensor:
        """Returns n exact samples, (n, 3, 16, 16) float32."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.centres.shape[1], generator=generator, dtype=torch.float64)
        return (self.centres[mode] + self.deviation * z).float().reshape(n, *self.shape)

    def sample(self, row: Row, seed: int, n: int) -> tuple[Tensor, int]:
        """Returns n samples and the mean number of evaluations per sample."""
        options = {k: v for k, v in row.options.items() if k != "table"}
        self.model.tuned = self.table if row.table == "tuned" else table_of(row.table)
        # A mixture is no ScoreModel, and has what methods read of one.
        program = methods.build(row.method, self.model, row.steps, options)  # type: ignore[arg-type]
        samples = torch.arange(n)
        chains = Chains(initial_state(program, seed, samples, self.shape), seed, samples)
        if isinstance(program, Procedure):
            x, nfe = program.solve(self.score, chains, None, None)
            return x, round(float(nfe.double().mean()))

        def network(x: Tensor, k: int) -> Tensor:
            sigma = float(program.sigma[k])
            return sigma * self.score(x, torch.full((len(x),), sigma))

        return run(program, network, chains), program.nfe

    def figures(self, x: Tensor) -> Record:
        """Computes mode shares, their total variation to the weights, in-mode variance ratio."""
        distance = torch.cdist(x.flatten(1).double(), self.centres)
        nearest, mode = distance.min(dim=1)
        share = torch.bincount(mode, minlength=10).double() / len(x)
        return {
            "share": share.tolist(),
            "total_variation": float((share - self.weights).abs().sum() / 2),
            "variance_ratio": float(nearest.square().mean() / x[0].numel() / self.deviation**2),
        }


class Shipped:
    """Shipped model, run by the production engine and evaluated as on its model card.

    Args:
        table: of its rows with one; None for the one that ships. All others run without.
    """

    def __init__(
        self, name: str, judge: Callable[[Tensor], DigitFigures], table: TunedTable | None = None
    ) -> None:
        self.sampler, self.judge = Sampler(name, batch_size=64), judge
        self.table = table or self.sampler.model.tuned

    def sample(self, row: Row, seed: int, n: int) -> tuple[Tensor, int]:
        """Returns n samples and the mean number of evaluations per sample."""
        options = {k: v for k, v in row.options.items() if k != "table"}
        self.sampler.model.tuned = self.table if row.table == "tuned" else table_of(row.table)
        x = self.sampler.sample(
            n, seed=seed, method=row.method, steps=row.steps, progress=False, **options
        )
        assert self.sampler.report is not None
        return x, round(self.sampler.report.nfe)

    def figures(self, x: Tensor) -> Record:
        return dataclasses.asdict(self.judge(x))


def of_digits(table: TunedTable | None = None) -> Shipped:
    """Returns the model of the UCI digits."""
    return Shipped("digits", digit_figures, table)


def of_mnist(data: str) -> Shipped:
    """Returns the model of MNIST, judged beside real images: a folder of the four IDX files."""
    found = Shipped("mnist", lambda x: real.figures(x))
    channels, size, _ = found.sampler.model.image_shape
    train, test = (
        datasets.open_images(f"{data}:{split}", size=size, channels=channels)
        for split in ("train", "test")
    )
    real = RealDigits(load_extractor("mnist"), train, test)
    return found


# Each is opened with the folder of --mnist.
DATA: dict[str, Callable[[str], Shipped | Mixture]] = {
    "digits": lambda _: of_digits(),
    "mnist": of_mnist,
    "mixture-0.05": lambda _: Mixture(0.05),
    "mixture-0.15": lambda _: Mixture(0.15),
}
MODELS = ("digits", "mnist")


def rows_of(kind: str) -> list[Row]:
    """Returns all rows, and that of a tuned table for a model that ships with one."""
    folder = shipped().get(kind)
    return [TUNED, *ROWS] if folder is not None and (folder / TABLE_NAME).exists() else ROWS


def key(record: Record) -> str:
    """Returns the identity of a measurement; records with equal keys are the same one."""
    names = ("data", "method", "steps", "options", "seed", "n")
    return json.dumps([record[name] for name in names], sort_keys=True)


def missing(
    records: list[Record],
    kinds: list[str],
    only: list[str] | None,
    n: int,
    rows: list[Row] | None = None,
) -> list[Record]:
    """Returns the records still to be measured, by importance: all rows with seed 0, then 1, ..."""
    done = {key(record) for record in records}
    wanted = [
        {"data": kind, "method": row.method, "steps": row.steps, "options": row.options,
         "seed": seed, "n": n}
        for kind in kinds
        for seed in range(LAST_SEED)
        for row in (rows_of(kind) if rows is None else rows)
        if row.has(kind, seed)
        and (only is None or row.method in only)
    ]  # fmt: skip
    return [record for record in wanted if key(record) not in done]


def measure(source: Shipped | Mixture, record: Record) -> Record:
    """Returns the record with evaluations, seconds and figures."""
    row = Row(record["method"], record["steps"], record["options"])
    began = time.perf_counter()
    x, nfe = source.sample(row, record["seed"], record["n"])
    seconds = round(time.perf_counter() - began, 1)
    return {**record, "nfe": nfe, "seconds": seconds, "figures": source.figures(x)}


def dump(records: list[Record]) -> str:
    """Returns the file's text, one line per record."""
    return '{"records": [\n' + ",\n".join(json.dumps(r) for r in records) + "\n]}\n"


def table_of(name: str | None) -> TunedTable | None:
    """Returns the table of a file that lies beside the results; None for no name."""
    if name is None:
        return None
    return TunedTable.from_dict(json.loads((TABLES / f"{name}.json").read_text()))


def tuned_table(folder: Path) -> TunedTable:
    """Returns the table of a model folder; ValueError if it has none."""
    found = read_table(load("digits"), folder)
    if found is None:
        raise ValueError(f"{folder} has no {TABLE_NAME}; run python -m ncsn_fast.tune first")
    return found


def main(args: list[str] | None = None) -> int:
    """Measures and returns exit code 0; methods unknown to this version are named and skipped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued if it exists")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--mnist", metavar="FOLDER", help="MNIST's IDX files, for its model's rows")
    parser.add_argument("--n", type=int, default=1000, help="samples per seed (1000)")
    parser.add_argument("--tuned", type=Path, metavar="FOLDER", help="a tuned digits model alone")
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds alone")
    chosen = parser.parse_args(args)
    records = json.loads(chosen.out.read_text())["records"] if chosen.out.exists() else []
    rows, kinds = None, chosen.data
    sources: dict[str, Shipped | Mixture] = {}
    if chosen.tuned is not None:
        rows, kinds, sources = [TUNED], ["digits"], {"digits": of_digits(tuned_table(chosen.tuned))}
    if "mnist" in kinds and (chosen.mnist is None or "mnist" not in shipped()):
        print("mnist: needs --mnist, a folder of its IDX files, and its model; left out")
        kinds = [kind for kind in kinds if kind != "mnist"]
    todo = missing(records, kinds, chosen.only, chosen.n, rows)
    todo = [r for r in todo if chosen.seeds is None or r["seed"] in chosen.seeds]
    for method in dict.fromkeys(r["method"] for r in todo if r["method"] not in methods.METHODS):
        print(f"{method}: no such method in this version; left out")
    for record in (r for r in todo if r["method"] in methods.METHODS):
        kind = record["data"]
        if kind not in sources:
            sources[kind] = DATA[kind](chosen.mnist)
        records.append(measure(sources[kind], record))
        with atomic_write(chosen.out) as path:
            path.write_text(dump(records))
        print(json.dumps(records[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
