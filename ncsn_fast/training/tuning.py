"""`ncsn_fast.tune`: fits the table of method "fast" to a model.

The tables of a small family (samplers/table_family.py) are searched by CMA-ES for the one whose
samples are nearest to reference images, by a distance that needs no labels
(evaluation/sample_loss.py). All candidates of a generation use the same noise, and each generation
other noise. Every few generations the mean of the search is judged on held-out seeds, which stops a
search that gains nothing any more, and the best of these is compared with the default table on
seeds that nothing was chosen on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.checkpoints.model_folder import CONFIG_NAME, TABLE_NAME, save_model, save_table
from ncsn_fast.checkpoints.safetensors_file import read_safetensors
from ncsn_fast.checkpoints.shipped import shipped
from ncsn_fast.checkpoints.training_run import is_run
from ncsn_fast.data import datasets
from ncsn_fast.data.files import atomic_write
from ncsn_fast.evaluation.evaluator import describe_source, open_source
from ncsn_fast.evaluation.features import Extractor, load_extractor
from ncsn_fast.evaluation.sample_loss import LEVELS, OF_FEATURES, Loss, SampleLoss
from ncsn_fast.inference.runner import Job, SamplingError
from ncsn_fast.inference.runner import run as run_chains
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.models.tuned_table import MOST_MEAN, TunedTable
from ncsn_fast.notices import notice
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.sampler import Sampler
from ncsn_fast.samplers.few_step import tuned
from ncsn_fast.samplers.table_family import HIGHEST, LOWEST, SPREAD, TableFamily, Vector
from ncsn_fast.training.table_search import WORST, Journal, Search, import_cma

log = logging.getLogger(__name__)
STATE_NAME, REFERENCES_NAME = "search.json", "references.safetensors"
POPSIZE, CHECK_EVERY, PATIENCE = 10, 4, 5  # candidates; generations; checks without a gain
HELD_OUT_SEEDS, TEST_SEEDS = 2, 5
DATA_REFERENCES, OWN_REFERENCES, MEAN_IMAGES = 2000, 1000, 64
MOST_ELEMENTS = 1 << 27  # of the references, if their number is not given: they stay in memory
# Seeds of a search with --seed S are 2^17 (S + 1) on: of generations, of held-out checks, of the
# test, and of the references. Those of the last 64 are for users' own judgement.
SEED_BLOCK, SEED_HELD_OUT, SEED_TEST, SEED_REFERENCES = 2**17, 2**16, 2**16 + 2**12, 2**16 + 2**13


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Result of `tune`.

    Attributes:
        table: the best table that was found.
        better: whether it beats the default table of as many steps beyond doubt: on the test seeds,
            by more than two standard errors. Otherwise nothing was changed.
        loss: name of the loss.
        before, after: losses of the default table and of this one on each test seed.
        candidates, seconds: of the search, in all sittings.
        written: the model folder with the table, or None.
    """

    table: TunedTable
    better: bool
    loss: str
    before: list[float]
    after: list[float]
    candidates: int
    seconds: float
    written: Path | None = None

    def __str__(self) -> str:
        gain, error = gain_of(self.before, self.after)
        before, after = statistics.mean(self.before), statistics.mean(self.after)
        verdict = (
            f"better by {gain:.3g} +- {error:.2g}"
            if self.better
            else f"not better beyond doubt ({gain:.3g} +- {error:.2g}): nothing was changed"
        )
        where = "" if self.written is None else f"; written to {self.written / TABLE_NAME}"
        return (
            f"{self.table.steps} steps, {self.candidates} candidates, {self.seconds / 60:.1f} "
            f"minutes: {self.loss} {before:.4g} by the default table, {after:.4g} by the tuned "
            f"one, {verdict}{where}"
        )


def gain_of(before: list[float], after: list[float]) -> tuple[float, float]:
    """Returns the mean gain over seeds, and its standard error."""
    gains = [b - a for b, a in zip(before, after, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """Settings that a search depends on; the arguments of `tune` of these names."""

    nfe: int = 10
    data: str | None = None
    loss: Loss = "energy"
    samples: int = 512
    references: int | None = None
    start_mean: bool = False
    seed: int = 0
    background: str = "white"

    def __post_init__(self) -> None:
        noise.check_integer("nfe", self.nfe, least=2)
        noise.check_integer("samples", self.samples, least=2)
        if self.references is not None:
            noise.check_integer("references", self.references, least=2)
        noise.check_integer("seed", self.seed, least=0)
        if self.seed >= 2**32 // SEED_BLOCK - 1:
            raise ValueError(
                f"tune takes seeds below {2**32 // SEED_BLOCK - 1}, as each stands for many; got "
                f"{self.seed}"
            )

    def seeds(self, first: int, n: int) -> range:
        """Returns n of the noise seeds of this search."""
        base = SEED_BLOCK * (self.seed + 1) + first
        return range(base, base + n)


def tune(
    model: str | Path | ScoreModel | None = None,
    *,
    nfe: int = 10,
    budget: float = 30.0,
    candidates: int | None = None,
    data: str | Tensor | None = None,
    loss: Loss = "energy",
    extractor: str | Path | Extractor | None = None,
    samples: int = 512,
    references: int | None = None,
    start_mean: bool = False,
    initial: TunedTable | None = None,
    seed: int = 0,
    background: str = "white",
    state: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Tuned:
    """Fits the table of method "fast" to a model, for a number of network evaluations.

    If it beats the default table, the model gets it (`model.tuned`), and so does the model folder;
    otherwise nothing changes.

    Args:
        model: as in Sampler. A model folder gets the table; others need `out`, unless the model is
            a ScoreModel.
        nfe: network evaluations per sample, and rows of the table.
        budget: minutes of search, in all sittings together.
        candidates: most tables to try, rounded up to whole generations of 10; None for as many as
            the budget allows. The result is then the same on a machine of another speed.
        data: reference images, in any format of train --data, or a tensor of samples as the model
            draws them. None: samples of the model's own `ald`.
        loss: "energy" or "mmd", of images and of what the denoiser makes of them; "frechet" or
            "kid", of an extractor's features.
        extractor: "digits", "mnist", a file, or an Extractor; as in evaluate --extractor. Energy
            and mmd compare its features, too, and how sure its classifier is.
        samples: number of samples of a candidate.
        references: number of references (2000 images of data, 1000 samples).
        start_mean: start at N(mean, sigma_1^2), with the mean of the denoiser's outputs at sigma_1.
        initial: table that the search starts from, of any number of rows; None for the default.
        seed: of the search and of all noise.
        background: colour below the transparent pixels of data.
        state: folder in which the search is kept; a search that was interrupted goes on there. None
            keeps it in memory.
        out: model folder to write, with the model and its table.
        options: those of Sampler (engine, dtype, device, batch_size, threads, ...).

    Raises:
        ValueError: arguments that do not go together, or a state of another search.
    """
    import_cma()
    given = data if isinstance(data, Tensor) else None
    named = data if isinstance(data, str) else None if given is None else _name_of(given)
    settings = TuneSettings(nfe, named, loss, samples, references, start_mean, seed, background)
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget must be a number of minutes; got {budget}")
    if candidates is not None:
        noise.check_integer("candidates", candidates, least=0)
    if isinstance(extractor, (str, Path)):
        extractor = load_extractor(extractor)
    if loss in OF_FEATURES and extractor is None:
        raise ValueError(f"loss {loss!r} is of features: name an extractor")
    target = output_folder(model, out)
    sampler = Sampler(model, **options)
    folder = None if state is None else Path(state)
    fit = _Fit(sampler, settings, extractor, folder, progress, given, initial)
    found = fit.run(budget, candidates)
    if not found.better:
        return found
    sampler.model.tuned = found.table
    if out is not None:
        save_model(sampler.model, Path(out))
    elif target is not None:
        save_table(found.table, target)
    return dataclasses.replace(found, written=target)


def output_folder(model: str | Path | ScoreModel | None, out: str | Path | None) -> Path | None:
    """Returns the model folder that gets the table; None for a ScoreModel in memory.

    Raises:
        ValueError: there is none, and `out` does not name one.
    """
    if out is not None:
        if is_run(Path(out)):
            raise ValueError(f"{out} is a training run; write the model folder elsewhere")
        return Path(out)
    if isinstance(model, ScoreModel):
        return None
    if model is not None:
        path = Path(model).expanduser()
        path = path.parent if path.is_file() else path
        folder = (path / CONFIG_NAME).exists() and not is_run(path)
        if folder and path.resolve() not in {p.resolve() for p in shipped().values()}:
            return path
    raise ValueError(
        f"{'the newest run' if model is None else model} is no model folder that could get the "
        "table: name a folder to write with out (--out)"
    )


class _Fit:
    """Search for one model: draws the samples of tables and judges them."""

    def __init__(
        self,
        sampler: Sampler,
        settings: TuneSettings,
        extractor: Extractor | None,
        state: Path | None,
        progress: bool,
        given: Tensor | None = None,
        initial: TunedTable | None = None,
    ) -> None:
        self.sampler, self.settings, self.progress = sampler, settings, progress
        self.extractor = extractor
        self.model = model = sampler.model
        self.ladder: Vector = model.sigmas.double().cpu().numpy()
        self.default = self.family(TableFamily())  # ValueError before the work starts
        start = TableFamily() if initial is None else TableFamily.of_table(initial, self.ladder)
        self.start = start.vector()
        if settings.start_mean and math.prod(model.image_shape) > MOST_MEAN:
            raise ValueError(
                f"the start's mean is for images of at most {MOST_MEAN} numbers, and these have "
                f"{math.prod(model.image_shape)}: leave start_mean out"
            )
        if extractor is not None:
            if not model.bounded or model.image_shape[0] not in (1, 3):
                raise ValueError(
                    f"an extractor takes grey or RGB images, and this model's are "
                    f"{model.image_shape}: choose loss energy or mmd"
                )
            extractor.to(sampler.device)
        images = None
        if settings.data is not None and given is None:
            images = open_source(settings.data, model, settings.background)
            self.references = self._of_data(images)
        described = self._describe(extractor, images)
        self.journal = Journal.open(None if state is None else state / STATE_NAME, described)
        if state is not None:
            state.mkdir(parents=True, exist_ok=True)
        if given is not None:
            self.references = self._chosen(given)
        elif images is None:
            self.references = self._drawn(state)
        self.mean = self._start_mean() if settings.start_mean else None
        ends = float(self.ladder[-1]), float(self.ladder[0])
        self.loss = SampleLoss(
            settings.loss, self.references, denoise=self._denoise, limits=ends,
            extractor=extractor, noise_seed=settings.seeds(SEED_REFERENCES, 1)[0],
        )  # fmt: skip

    def _describe(
        self, extractor: Extractor | None, images: datasets.Images | None
    ) -> dict[str, Any]:
        """Returns everything that the losses depend on, for JSON."""
        described = {**dataclasses.asdict(self.settings), "model": _weights_digest(self.model)}
        described |= {"cma": import_cma().__version__, "popsize": POPSIZE}  # make the candidates
        described |= {"start": self.start.tolist(), "spread": SPREAD.tolist(), "levels": [*LEVELS]}
        described |= {"lowest": LOWEST.tolist(), "highest": HIGHEST.tolist()}
        if extractor is not None:
            described["extractor"] = extractor.describe()
        if images is not None:
            assert self.settings.data is not None
            described |= describe_source(self.settings.data, images)
        return described

    def _of_data(self, images: datasets.Images) -> Tensor:
        """Returns reference images: an even choice of the data's."""
        n = min(len(images), self._n_references(DATA_REFERENCES))
        rows = np.linspace(0, len(images) - 1, n).round().astype(int).tolist()
        return datasets.stack(images, rows).float() / 255

    def _drawn(self, state: Path | None) -> Tensor:
        """Returns references that are samples of the model's own ald."""
        n = self._n_references(OWN_REFERENCES)
        seed = self.settings.seeds(SEED_REFERENCES, 1)[0]
        path = None if state is None else state / REFERENCES_NAME
        drawn = torch.empty(0, *self.model.image_shape)
        if path is not None and path.exists():
            drawn = read_safetensors(path)[0]["samples"]
        if len(drawn) < n:
            notice(log, "references: %d samples by ald, of the model itself", n)
        rest = range(len(drawn), n)
        for _, x in self.sampler.stream(rest, seed=seed, progress=self.progress):
            drawn = torch.cat((drawn, x))
            if path is not None:
                _save_tensor(drawn, path)
        return drawn

    def _chosen(self, given: Tensor) -> Tensor:
        """Returns an even choice of the caller's references, as states."""
        shape = tuple(self.model.sample_shape)
        if tuple(given.shape[1:]) != shape or len(given) < 2 or given.is_complex():
            raise ValueError(
                f"references must be real numbers (N, {', '.join(map(str, shape))}), 2 or more; "
                f"got {tuple(given.shape)}"
            )
        n = min(len(given), self._n_references(DATA_REFERENCES))
        rows = torch.linspace(0, len(given) - 1, n).round().long()
        return given.detach().cpu()[rows].float().reshape(n, *self.model.image_shape)

    def _n_references(self, usual: int) -> int:
        """Returns the number of references that was asked for, or the usual one if it fits."""
        most = max(2, MOST_ELEMENTS // math.prod(self.model.image_shape))
        return self.settings.references or min(usual, most)

    def _start_mean(self) -> Vector:
        """Estimates the mean of the data by the denoiser at the first level."""
        shape, sigma = self.model.image_shape, float(self.ladder[0])
        seed = self.settings.seeds(SEED_REFERENCES, 1)[0]
        z = noise.normal(seed, torch.arange(MEAN_IMAGES), Stream.MEASUREMENT, 1, shape)
        mean = self._denoise(sigma * z, sigma).mean(dim=0)
        return np.round(mean.double().numpy(), 4)  # far below sigma_1

    def _denoise(self, x: Tensor, sigma: float) -> Tensor:
        return x + sigma**2 * self.sampler.score(x, sigma)

    def family(self, point: TableFamily, **more: Any) -> TunedTable:
        """Returns the rows of a point of the family, for this model.

        ValueError if the network cannot tell so many levels apart.
        """
        table = point.table(
            self.ladder, self.settings.nfe, self.model.image_shape,
            trained=self.model.conditional, **more,
        )  # fmt: skip
        known = self.model.parameterisation.known_levels(np.asarray(table.sigmas))
        if len(known) < table.steps:
            raise ValueError(
                f"this network tells {len(known)} of {table.steps} levels apart; take a smaller nfe"
            )
        return dataclasses.replace(table, sigmas=tuple(known.tolist()))

    def measure(self, table: TunedTable | None, seed: int) -> float:
        """Draws samples by a table and returns their loss; WORST where there is none."""
        if table is None:
            return WORST
        n = self.settings.samples
        engine = self.sampler.engine_for(n)
        job = Job(noise.sample_indices(0, n))
        try:
            parts = [b.x for b in run_chains(engine, tuned(table), job, seed, progress=False)]
        except SamplingError:
            return WORST
        x = torch.cat(parts)
        return self.loss(x.clamp(0, 1) if self.model.bounded else x)

    def measure_all(self, table: TunedTable | None, seeds: range) -> list[float]:
        return [self.measure(table, seed) for seed in seeds]

    def table_of(self, vector: Vector) -> TunedTable | None:
        """Returns the table at these search coordinates; None if the network has no such levels."""
        try:
            return self.family(TableFamily.of_vector(vector), mean=self.mean)
        except ValueError:
            return None

    def run(self, budget: float, candidates: int | None) -> Tuned:
        """Searches for so many minutes or candidates, or until nothing is gained, and judges."""
        began, before = time.monotonic(), self.journal.seconds
        search = Search(
            self.journal, self.start, spread=SPREAD, lowest=LOWEST, highest=HIGHEST,
            popsize=POPSIZE, seed=self.settings.seed + 1,
        )  # fmt: skip
        total = round(60 * budget)
        with tqdm(total=total, unit="s", desc="tune", disable=not self.progress) as bar:

            def loss(vector: Vector, generation: int) -> float:
                seed = self.settings.seeds(generation, 1)[0]
                found = self.measure(self.table_of(vector), seed)
                self.journal.seconds = before + time.monotonic() - began
                bar.n = min(round(self.journal.seconds), total)
                bar.set_postfix(candidates=len(self.journal.losses) + 1)
                return found

            best = self._search(search, loss, 60 * budget, candidates)
        return self._judge(best)

    def _search(
        self,
        search: Search,
        loss: Callable[[Vector, int], float],
        seconds: float,
        candidates: int | None,
    ) -> Vector:
        """Runs generations until nothing is gained, or for so long; returns the best mean.

        Means are compared on held-out seeds with each other and with the default table.
        """
        seeds = self.settings.seeds(SEED_HELD_OUT, HELD_OUT_SEEDS)
        best, lowest, stale = TableFamily().vector(), self._measured("held-out 0", None, seeds), 0
        while stale < PATIENCE and not search.converged and search.generation < SEED_HELD_OUT:
            done = search.generation * POPSIZE
            known = len(self.journal.losses) >= done + POPSIZE
            if done >= (math.inf if candidates is None else candidates) or (
                self.journal.seconds >= seconds and not known
            ):
                break
            search.step(loss)
            if search.generation % CHECK_EVERY == 0:
                mean = search.mean
                found = self._measured(f"held-out {search.generation}", mean, seeds)
                log.info(
                    "%d candidates: %s %.4g on held-out seeds, %.4g the best before",
                    search.generation * POPSIZE, self.settings.loss, found, lowest,
                )  # fmt: skip
                stale += 1
                if found < lowest:
                    best, lowest, stale = mean, found, 0
        return best

    def _measured(self, name: str, vector: Vector | None, seeds: range) -> float:
        """Returns the mean loss over seeds at search coordinates, or of the default table."""
        table = self.default if vector is None else self.table_of(vector)
        return statistics.mean(self.journal.value(name, lambda: self.measure_all(table, seeds)))

    def _judge(self, best: Vector) -> Tuned:
        """Compares the best table with the default one on the test seeds."""
        journal, seeds = self.journal, self.settings.seeds(SEED_TEST, TEST_SEEDS)
        table = self.table_of(best) or self.default
        before = journal.value("test", lambda: self.measure_all(self.default, seeds))
        name = f"test {best.tolist()}"
        after = journal.value(name, lambda: self.measure_all(table, seeds))
        gain, error = gain_of(before, after)
        facts = {
            "loss": self.settings.loss, "before": before, "after": after,
            "references": self.settings.data or "ald", "samples": self.settings.samples,
            "extractor": self.extractor and self.extractor.name,
            "candidates": len(journal.losses), "seconds": round(journal.seconds),
        }  # fmt: skip
        return Tuned(
            dataclasses.replace(table, facts=facts), gain > 2 * error, self.settings.loss,
            before, after, len(journal.losses), journal.seconds,
        )  # fmt: skip


def _save_tensor(samples: Tensor, path: Path) -> None:
    import safetensors.torch

    content = safetensors.torch.save({"samples": samples.contiguous()})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _weights_digest(model: ScoreModel) -> str:
    """Returns the SHA-256 of weights and noise levels, the same in every process.

    ScoreModel.digest tells networks of the user's own apart by their code, too, and where that is
    not known differs from process to process: no search of such a network could go on.
    """
    total = hashlib.sha256(model.config.arch.encode())
    for key, value in sorted(model.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _name_of(samples: Tensor) -> str:
    """Returns a name for a tensor that tells it from others."""
    content = samples.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"tensor {hashlib.sha256(content).hexdigest()[:16]}"
