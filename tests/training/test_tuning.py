"""Tuning: the search and its state, on a model whose score is exact."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny
import torch
import unets
from torch import nn

import ncsn_fast
from ncsn_fast import ScoreModel
from ncsn_fast.checkpoints.model_folder import TABLE_NAME
from ncsn_fast.samplers.table_family import HIGHEST, LOWEST, SPREAD, TableFamily
from ncsn_fast.training import tuning
from ncsn_fast.training.table_search import WORST, Journal, Search
from ncsn_fast.training.tuning import HELD_OUT_SEEDS, POPSIZE, TEST_SEEDS, TuneSettings, gain_of

SHAPE = (1, 4, 4)


class Posterior(nn.Module):
    """Denoiser of data N(0.8, 0.1^2 I), exact at every sigma."""

    def forward(self, x, sigma):
        keep = 0.01 / (0.01 + sigma.square())[:, None, None, None]
        return keep * x + (1 - keep) * 0.8


def exact_model(sigma_max=5.0) -> ScoreModel:
    return ncsn_fast.wrap(
        Posterior(), predicts="denoised", sees="sigma", image_shape=SHAPE,
        sigma_min=0.01, sigma_max=sigma_max, n_sigmas=20, n_steps_each=1,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    levels = np.clip(255 * rng.normal(0.8, 0.1, (300, 1, 4, 4)), 0, 255).astype(np.uint8)
    np.save(tmp_path / "data.npy", levels)
    return str(tmp_path / "data.npy")


def fit(model, **changes):
    usual = {
        "nfe": 3, "candidates": POPSIZE, "samples": 4, "references": 4, "engine": "eager",
        "batch_size": 4, "progress": False,
    }  # fmt: skip
    return tuning.tune(model, **{**usual, **changes})


def test_a_fit_beats_the_default_table(data):
    """In three steps the default's variance is far off; the loss needs no labels to see it."""
    model = exact_model()
    settings = {"samples": 100, "batch_size": 100, "references": 300, "start_mean": True}
    found = fit(model, data=data, candidates=8 * POPSIZE, **settings)
    assert found.better
    gain, error = gain_of(found.before, found.after)
    assert gain > 2 * error > 0
    assert len(found.before) == len(found.after) == TEST_SEEDS
    assert model.tuned == found.table
    assert (found.table.steps, found.candidates, found.written) == (3, 8 * POPSIZE, None)
    assert found.table.mean == pytest.approx([0.8] * 16, abs=0.01)
    assert "better by" in str(found)
    sampler = ncsn_fast.Sampler(model, engine="eager")
    tuned = sampler.sample(500, method="fast", seed=9, progress=False)
    usual = sampler.sample(500, method="fast", seed=9, steps=3, s_noise=1.0, progress=False)
    assert abs(tuned.std() - 0.1) < abs(usual.std() - 0.1)


@pytest.fixture
def unmeasured(monkeypatch):
    """No samples are drawn: a table's loss is its last level."""
    monkeypatch.setattr(
        tuning._Fit, "measure", lambda self, table, seed: table.sigmas[-1] if table else WORST
    )


def test_what_is_not_better_changes_nothing(tmp_path, unmeasured):
    """Without a generation the best table is the default one."""
    folder = tiny.model().save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = fit(folder, candidates=0, data="digits:train")
    assert not found.better
    assert "nothing was changed" in str(found)
    assert found.after == found.before
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("at", [3, POPSIZE + 2 * HELD_OUT_SEEDS + 3])
def test_interrupted_fits_go_on_where_they_were(at, tmp_path, monkeypatch):
    """Ctrl-C at any batch of samples: the next call measures what is missing, and ends the same."""
    monkeypatch.setattr(tuning, "CHECK_EVERY", 1)
    whole = fit(exact_model())
    measure, seeds = tuning._Fit.measure, []

    def count(self, table, seed):
        seeds.append(seed)
        if len(seeds) == at + 1:
            raise KeyboardInterrupt
        return measure(self, table, seed)

    monkeypatch.setattr(tuning._Fit, "measure", count)
    with pytest.raises(KeyboardInterrupt):
        fit(exact_model(), state=tmp_path / "state")
    for _ in range(2):
        resumed = fit(exact_model(), state=tmp_path / "state")
        assert (resumed.table, resumed.before, resumed.after) == (
            whole.table, whole.before, whole.after,
        )  # fmt: skip
    needed = POPSIZE + 2 * HELD_OUT_SEEDS + 2 * TEST_SEEDS
    assert needed < len(seeds) <= needed + TEST_SEEDS  # those of one measurement, at most, again


def test_networks_of_unknown_code_go_on_too(tmp_path):
    """The identity of a network that holds a function differs from process to process."""
    found = []
    for _ in range(2):
        net = Posterior()
        net.function = lambda x: x
        model = ncsn_fast.wrap(
            net, predicts="denoised", sees="sigma", image_shape=SHAPE, sigma_min=0.01,
            sigma_max=5.0, n_sigmas=20, n_steps_each=1,
        )  # fmt: skip
        found.append(model.digest())
        fit(model, candidates=0, state=tmp_path)
    assert found[0] != found[1]


def test_references_of_the_model_itself_are_kept(tmp_path, monkeypatch):
    settings = {"candidates": 0, "state": tmp_path, "batch_size": 2}
    stream, drawn = ncsn_fast.Sampler.stream, []

    def interrupted(self, rows, **options):
        for part, images in stream(self, rows, **options):
            yield part, images
            drawn.extend(part.tolist())
            if len(drawn) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(ncsn_fast.Sampler, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(exact_model(), references=6, **settings)
    fit(exact_model(), references=6, **settings)
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_a_state_is_of_one_search(tmp_path):
    settings = {"nfe": 2, "candidates": 0, "state": tmp_path}
    fit(exact_model(), **settings)
    with pytest.raises(ValueError, match="is of a search with another nfe, samples: choose"):
        fit(exact_model(), **{**settings, "samples": 5, "nfe": 3})
    with pytest.raises(ValueError, match="is of a search with another model: choose"):
        fit(exact_model(sigma_max=6.0), **settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot use .*search.json: .*choose another --state"),
        ("{}", "is no state of tune"),
        ('{"version": 1, "settings": {}, "seconds": 1, "losses": [], "values": []}', "is damaged"),
        ('{"version": 1, "settings": {}, "seconds": 1, "losses": ["a"], "values": {}}', "damaged"),
        ('{"version": 1, "settings": {}, "losses": [], "values": {}}', "is damaged"),
    ],
)
def test_damaged_states_are_refused(text, words, tmp_path):
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Journal.open(tmp_path / "search.json", {})


def quadratic(target):
    return lambda vector, generation: float(np.square((vector - target) / SPREAD).sum())


def search(journal, seed=1):
    return Search(
        journal, TableFamily().vector(), spread=SPREAD, lowest=LOWEST, highest=HIGHEST,
        popsize=POPSIZE, seed=seed,
    )  # fmt: skip


def test_the_search_finds_a_table(tmp_path):
    target = TableFamily((1.2, 0.9), 3.0, (1.0, 5.0, 4.0, 0.5), (1.4, 0.6, 1.3)).vector()
    found, loss = search(Journal(None, {})), quadratic(target)
    begin = loss(found.mean, 0)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(60):
        found.step(loss)
    assert loss(found.mean, 0) < 0.05 * begin
    assert (found.mean >= LOWEST).all()
    assert (found.mean <= HIGHEST).all()
    # NumPy's own generator is not touched.
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_candidates_without_a_loss_are_the_worst():
    journal = Journal(None, {})
    search(journal).step(lambda vector, generation: np.nan if vector[2] > 0.1 else 1.0)
    assert set(journal.losses) <= {1.0, WORST}


def test_lost_samples_are_the_worst(monkeypatch):
    """A table whose chains leave the finite numbers ends no search."""
    model = exact_model()
    model.net.net.forward = lambda x, sigma: x * 1e38
    made = tuning._Fit.__new__(tuning._Fit)
    made.sampler = ncsn_fast.Sampler(model, engine="eager", batch_size=4)
    made.settings, made.model = TuneSettings(nfe=3, samples=4), model
    table = TableFamily().table(model.sigmas.double().numpy(), 3, SHAPE)
    assert made.measure(table, 0) == WORST


def test_seeds_of_searches_do_not_meet():
    used = set()
    for seed in (0, 1, 2**15 - 2):
        settings = TuneSettings(seed=seed)
        for first in (0, tuning.SEED_HELD_OUT, tuning.SEED_TEST, tuning.SEED_REFERENCES):
            block = set(settings.seeds(first, 3))
            assert not block & used
            assert max(block) < 2**32
            assert min(block) >= 2**17  # those that users take first are left to judge by
            used |= block


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nfe": 1}, "nfe must be at least 2; got 1"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"references": 1}, "references must be at least 2"),
        ({"candidates": -1}, "candidates must be at least 0"),
        ({"budget": float("nan")}, "budget must be a number of minutes; got nan"),
        ({"seed": 2**15}, "tune takes seeds below 32767"),
        ({"loss": "kid"}, "'kid' is of features: name an extractor"),
        ({"loss": "fid"}, "loss must be energy, mmd, frechet or kid"),
        ({"data": "nowhere"}, "nowhere"),
        ({"data": torch.zeros(3, 1, 4, 5)}, r"\(N, 1, 4, 4\), 2 or more; got \(3, 1, 4, 5\)"),
        ({"data": torch.zeros(3, 1, 4, 4)}, "references must be finite and differ"),
        ({"model": None}, "the newest run is no model folder.*name a folder to write with out"),
        ({"model": "digits"}, "digits is no model folder that could get the table"),
    ],
)
def test_bad_arguments_are_refused_first(changes, words, monkeypatch):
    def stop(*args, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(tuning, "run_chains", stop)
    with pytest.raises((ValueError, TypeError, OSError), match=words):
        fit(**{"model": exact_model(), "references": 2, **changes})


def test_without_cma(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ValueError, match=r"needs the `cma` package.*pip install 'ncsn_fast\[tune"):
        fit(exact_model())


def test_a_search_starts_where_it_is_told(unmeasured, tmp_path):
    """Without a candidate the best is the default table; the first candidates lie at the start."""
    point = TableFamily(last=4.0, eta=(1.0, 2.0, 3.0, 4.0))
    model = exact_model()
    ladder = model.sigmas.double().numpy()
    fit(model, initial=point.table(ladder, 8, SHAPE), state=tmp_path)
    settings = json.loads((tmp_path / tuning.STATE_NAME).read_text())["settings"]
    assert settings["start"] == pytest.approx(point.vector().tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="of a search with another start: choose another --state"):
        fit(model, state=tmp_path)


def test_large_images_have_no_start_mean():
    model = tiny.model(image_size=(72, 72), channels=3)
    with pytest.raises(ValueError, match="at most 12288 numbers, and these have 15552"):
        fit(model, start_mean=True)


def test_out_writes_the_model_with_its_table(tmp_path, monkeypatch, unmeasured):
    better = dataclasses.replace
    monkeypatch.setattr(
        tuning._Fit, "_judge", lambda self, best, judge=tuning._Fit._judge: better(
            judge(self, best), better=True
        ),
    )  # fmt: skip
    folder = tiny.model().save_pretrained(tmp_path / "model")
    usual = {"candidates": 0, "data": "digits:train"}
    found = fit(folder, out=tmp_path / "out", **usual)
    assert found.written == tmp_path / "out"
    assert ncsn_fast.load(tmp_path / "out").tuned == found.table
    assert not (folder / TABLE_NAME).exists()
    found = fit(folder, **usual)
    assert found.written == folder
    facts = json.loads((folder / TABLE_NAME).read_text())["facts"]
    assert (facts["loss"], facts["references"], facts["candidates"]) == (
        "energy", "digits:train", 0,
    )  # fmt: skip
    assert torch.equal(ncsn_fast.load(folder).sigmas, tiny.model().sigmas)


def test_extractors_are_for_pictures():
    model = ncsn_fast.wrap(
        Posterior(), predicts="denoised", sees="sigma", image_shape=(2, 4, 4), data_range=None,
        sigma_min=0.01, sigma_max=5.0, n_sigmas=20, n_steps_each=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"grey or RGB images, and this model's are \(2, 4, 4\)"):
        fit(model, loss="kid", extractor="digits")


def test_references_as_a_tensor():
    """Samples of a model that are no images, in their own shape."""
    model = ncsn_fast.wrap(
        Posterior(), predicts="denoised", sees="sigma", image_shape=(4, 1, 4), data_range=None,
        sigma_min=0.01, sigma_max=5.0, n_sigmas=20, n_steps_each=1,
    )  # fmt: skip
    found = fit(model, data=torch.linspace(0, 1, 80).view(5, 4, 1, 4), references=3, candidates=0)
    assert found.table.shape == (4, 1, 4)
    assert found.table.facts["references"].startswith("tensor ")


def test_fits_of_features():
    data = {"data": "digits:train", "extractor": "digits", "candidates": 0}
    losses = ("kid", "frechet", "energy")
    found = {loss: fit(exact_model(), loss=loss, **data) for loss in losses}
    assert all(fitted.loss == loss for loss, fitted in found.items())
    assert all(fitted.table.facts["extractor"] == "digits" for fitted in found.values())
    found["images"] = fit(exact_model(), data="digits:train", candidates=0)
    assert found["images"].table.facts["extractor"] is None
    assert len({tuple(fitted.before) for fitted in found.values()}) == 4


def test_networks_that_know_few_levels_get_those(unmeasured):
    model, data = tiny.model(arch="ncsn"), {"data": "digits:train", "candidates": POPSIZE}
    found = fit(model, nfe=3, **data)
    assert set(found.table.sigmas) <= set(model.sigmas.double().tolist())
    chain = unets.model("edm-iddpm")
    found = fit(chain, nfe=4, **data)
    levels = np.asarray(found.table.sigmas)
    np.testing.assert_array_equal(chain.parameterisation.known_levels(levels), levels)
    with pytest.raises(ValueError, match=r"this network tells .* of 1000 levels apart"):
        fit(chain, nfe=1000, **data)
