"""The digits model that ships with the package: what it is, and that its figures are its own."""

import json

import pytest
import torch

import ncsn_fast
from ncsn_fast.checkpoints.loading import SHIPPED
from ncsn_fast.checkpoints.shipped import shipped
from ncsn_fast.evaluation.metrics import digit_figures
from ncsn_fast.models.score import ModelConfig


@pytest.fixture(scope="module")
def model() -> ncsn_fast.ScoreModel:
    return ncsn_fast.load("digits")


def test_it_is_small_and_what_its_config_says(model):
    weights = SHIPPED / "model.safetensors"
    assert weights.stat().st_size < 4_000_000
    assert ModelConfig.from_dict(json.loads((SHIPPED / "config.json").read_text())) == model.config
    assert (model.config.arch, model.image_shape) == ("ncsnv2", (1, 16, 16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", shipped())
def test_every_model_that_ships_is_small_and_has_figures_of_its_own(name):
    folder, known = shipped()[name], ncsn_fast.load(name)
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    config = json.loads((folder / "config.json").read_text())
    config.pop("weights_sha256", None)  # of newer folders; load compares it
    assert ModelConfig.from_dict(config) == known.config
    assert f"# Model card: {name}\n" in (folder / "README.md").read_text()
    figures = [json.loads(path.read_text()) for path in folder.glob("figures-*.json")]
    assert {found["model"] for found in figures} <= {known.digest()}
    record = folder / "record.json"
    assert not record.exists() or json.loads(record.read_text())["model"] == known.digest()


def committed(method, engine):
    return json.loads((SHIPPED / f"figures-{method}-{engine}.json").read_text())


@pytest.mark.parametrize("method", ["ald", "cas"])
@pytest.mark.parametrize(("engine", "dtype"), [("eager", "fp32"), ("cpu", "bf16")])
def test_figures_belong_to_this_model(model, method, engine, dtype):
    report = committed(method, engine)
    assert report["model"] == model.digest()
    assert report["figures"]["n"] == report["sampling"]["n"] == 1000
    drawn = {key: report["sampling"][key] for key in ("method", "engine", "dtype")}
    assert drawn == {"method": method, "engine": engine, "dtype": dtype}


@pytest.mark.parametrize("method", ["ald", "cas"])
def test_engines_score_the_same(method):
    """Both drew the same noise, so that their figures differ by what bfloat16 changes alone."""
    cpu, eager = (committed(method, engine)["figures"] for engine in ("cpu", "eager"))
    spread = 2 * (0.25 / 1000) ** 0.5  # two standard deviations of a share of 1000
    assert abs(cpu["recognised"] - eager["recognised"]) < spread
    assert cpu["class_share"] == pytest.approx(eager["class_share"], abs=spread)
    assert cpu["frechet"] == pytest.approx(eager["frechet"], rel=0.05)
    assert cpu["nearest_train"] == pytest.approx(eager["nearest_train"], rel=0.02)


def figures_of_samples(n):
    """Figures of n samples, whose share of recognised ones is that of the committed figures."""
    samples = ncsn_fast.Sampler("digits", device="cpu").sample(n, method="cas", progress=False)
    figures = digit_figures(samples)
    spread = (0.25 / n) ** 0.5  # the largest standard deviation of a share of n
    known = committed("cas", "eager")["figures"]["recognised"]
    assert abs(figures.recognised - known) < 4 * spread
    return figures


def test_its_samples_are_digits():
    figures = figures_of_samples(32)
    assert max(figures.class_share) < 0.5
    assert figures.nearest_train > 0.8 * figures.nearest_train_held_out


@pytest.mark.slow
def test_its_samples_are_digits_of_every_kind():
    figures = figures_of_samples(200)
    assert min(figures.class_share) > 0.01
    assert figures.nearest_train > 0.9 * figures.nearest_train_held_out
