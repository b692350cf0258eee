"""The digits model that ships with the package: what it is, and that its figures are its own."""

import json

import pytest
import torch

import ncsn_fast
from ncsn_fast.loading import SHIPPED
from ncsn_fast.metrics import digit_figures
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


@pytest.mark.parametrize("method", ["ald", "cas"])
def test_figures_belong_to_this_model(model, method):
    report = json.loads((SHIPPED / f"figures-{method}.json").read_text())
    assert report["model"] == model.digest()
    assert report["figures"]["n"] == report["sampling"]["n"] == 1000
    assert report["sampling"]["method"] == method


def test_its_samples_are_digits_of_every_kind():
    samples = ncsn_fast.Sampler("digits", device="cpu").sample(200, method="cas", progress=False)
    figures = digit_figures(samples)
    committed = json.loads((SHIPPED / "figures-cas.json").read_text())["figures"]
    spread = (0.25 / 200) ** 0.5  # the largest standard deviation of a share of 200
    assert abs(figures.recognised - committed["recognised"]) < 4 * spread
    assert min(figures.class_share) > 0.01
    assert figures.nearest_train > 0.9 * figures.nearest_train_held_out
