"""Bits per dimension of data sets and of callers' images, beside closed forms."""

import json
import math
import os

import exact
import numpy as np
import pytest
import tiny
import torch
import unets
from PIL import Image

import ncsn_fast
from ncsn_fast import Sampler
from ncsn_fast.data import datasets
from ncsn_fast.diffusion.sde import VP, SubVP
from ncsn_fast.evaluation import bits_per_dim
from ncsn_fast.evaluation.bits_per_dim import (
    LikelihoodSettings,
    Record,
    bits_per_dimension,
    figures_by_class,
    image_log_likelihood,
    measure,
    model_ends,
)
from ncsn_fast.evaluation.likelihood import Likelihood, dequantise, log_likelihood
from ncsn_fast.inference.runner import SamplingError

GAUSSIAN = exact.Gaussian(mean=0.0, spread=0.5)
LEVELS = torch.randint(
    256, (10, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)
SETTINGS = LikelihoodSettings(0.01, 50.0, seed=4)


def closed_form(indices) -> torch.Tensor:
    """-log2 N(x; m, s^2 + sigma_min^2) / D + 8 of the dequantised images."""
    keys = torch.tensor(indices)
    x = dequantise(LEVELS[keys], seed=4, samples=keys)
    return -GAUSSIAN.log_density(x.double(), 0.01) / (16 * math.log(2)) + 8


def measured(indices, **options):
    options = {"batch_size": 3, "progress": False, **options}
    record = options.pop("record", None) or Record()
    images = datasets.MemoryImages(LEVELS)
    return measure(GAUSSIAN.score, images, indices, SETTINGS, record, **options)


def test_a_data_set_has_the_bits_of_its_gaussian():
    """The Rademacher estimate is exact here; N(0, 50^2) as prior changes bits by some 1e-4."""
    found = measured(range(10))
    expected = closed_form(list(range(10)))
    assert found["bpd"]["n"] == 10
    assert found["bpd"]["mean"] == pytest.approx(float(expected.mean()), abs=5e-4)
    assert found["bpd"]["standard_error"] == pytest.approx(
        float(expected.std()) / math.sqrt(10), rel=1e-3
    )
    assert found["complete"]
    assert found["nfe"] > 20


def test_gaussian_pixels_have_the_printed_bits():
    """log2(2 pi e s^2) / 2 + 8 for levels drawn from N(1/2, s^2), s = 1/8: 7.047 bits."""
    s = 0.125
    z = exact.normals(40, 1, 8, 8, seed=1)
    levels = ((0.5 + s * z) * 256).floor().clamp(0, 255).to(torch.uint8)
    data_score = exact.Gaussian(mean=0.5, spread=s).score
    record = Record()
    found = measure(
        data_score, datasets.MemoryImages(levels), range(40), LikelihoodSettings(1e-3, 2000.0),
        record, batch_size=40, progress=False,
    )["bpd"]  # fmt: skip
    expected = 0.5 * math.log2(2 * math.pi * math.e * s**2) + 8
    assert expected == pytest.approx(9.047096 - 2, abs=1e-6)
    spread = math.sqrt(0.5 / 64) / math.log(2)  # of an image's mean of z^2 / 2, in bits
    assert found["standard_error"] == pytest.approx(spread / math.sqrt(40), rel=0.4)
    assert abs(found["mean"] - expected) < 4 * spread / math.sqrt(40)


def test_no_smoothed_data_have_fewer_bits_than_the_head_of_the_file_says():
    """log2(sigma_min sqrt(2 pi)) + 8, met by data that are one point."""
    point, x = exact.Gaussian(mean=0.5, spread=1e-9), torch.full((1, 1, 4, 4), 0.5).double()
    found = log_likelihood(point.score, x, 0.01, 50.0, prior_mean=0.5, prior_std=50.0)
    floor = math.log2(0.01 * math.sqrt(2 * math.pi)) + 8
    assert floor == pytest.approx(2.68, abs=0.005)
    assert float(found.bpd) == pytest.approx(floor, abs=1e-4)


class NoiseOfGaussianData(torch.nn.Module):
    """Predicts z in x_t = m u + s z exactly, for Gaussian u = 2 x - 1, from x_t and 999 t."""

    def __init__(self, sde) -> None:
        super().__init__()
        self.sde, self.mean, self.spread = sde, 2 * GAUSSIAN.mean - 1, 2 * GAUSSIAN.spread

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        t = (c.double() / 999)[:, None, None, None]
        m, std = self.sde.mean_scale(t), self.sde.std(t)
        return (std * (x - m * self.mean) / ((m * self.spread) ** 2 + std**2)).to(x.dtype)


@pytest.mark.parametrize("sde", [VP(), SubVP()], ids=repr)
def test_vp_models_have_the_bits_of_their_data(sde):
    """From t = 1e-5, in bits of images in [0, 1], though the network's are in [-1, 1]."""
    model = ncsn_fast.wrap(
        NoiseOfGaussianData(sde), predicts="epsilon", sees="time", process=sde, time_scale=999.0,
        data_range=(-1, 1), image_shape=(1, 4, 4),
    )  # fmt: skip
    low, high = model_ends(model)
    assert 2 * low == pytest.approx(float(sde.noise_level(1e-5)), rel=1e-6)
    assert 2 * high == pytest.approx(float(sde.noise_level(1.0)), rel=1e-6)
    found = image_log_likelihood(model, LEVELS, seed=4).bpd
    x = dequantise(LEVELS, seed=4).double()
    expected = -GAUSSIAN.log_density(x, low) / (16 * math.log(2)) + 8
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


def test_levels_of_the_callers_end_the_flow():
    """Those of VP networks are trained from t = 1e-5 on, unless the caller says otherwise."""
    model = ncsn_fast.wrap(
        NoiseOfGaussianData(VP()), predicts="epsilon", sees="time", process=VP(), time_scale=999.0,
        data_range=(-1, 1), image_shape=(1, 4, 4), sigma_min=0.1,
    )  # fmt: skip
    assert model_ends(model)[0] == pytest.approx(0.05)
    config = unets.config("edm-ddpmpp-vp")
    assert model_ends(ncsn_fast.ScoreModel(config))[0] == pytest.approx(config.sigma_end)


def test_an_image_keeps_its_bits_in_any_batch():
    images = datasets.MemoryImages(LEVELS)
    together = next(bits_per_dimension(GAUSSIAN.score, images, range(10), SETTINGS, batch_size=10))[
        1
    ]
    parts = bits_per_dimension(GAUSSIAN.score, images, [7, 2, 9], SETTINGS, batch_size=2)
    found = {i: float(b) for part, f in parts for i, b in zip(part, f.bpd, strict=True)}
    assert found == pytest.approx({i: float(together.bpd[i]) for i in (7, 2, 9)}, abs=1e-6)


def test_ctrl_c_loses_no_finished_batch(tmp_path, monkeypatch):
    path, stack = tmp_path / "bits.jsonl", datasets.stack

    def interrupted(images, indices):
        if 6 in indices:
            raise KeyboardInterrupt
        return stack(images, indices)

    monkeypatch.setattr(datasets, "stack", interrupted)
    found = measured(range(10), record=Record(path))
    assert not found["complete"]
    assert found["bpd"]["n"] == 6
    expected = closed_form(list(range(6)))
    assert found["bpd"]["mean"] == pytest.approx(float(expected.mean()), abs=5e-4)
    with open(path, "a") as file:
        file.write('{"index": 6, "bpd": 3.')  # what a kill leaves
    read = []
    monkeypatch.setattr(datasets, "stack", lambda im, i: (read.extend(i), stack(im, i))[1])
    resumed = measured(range(10), record=Record(path))
    assert read == [6, 7, 8, 9]
    assert resumed["complete"]
    assert resumed["bpd"] == pytest.approx(measured(range(10))["bpd"])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [*range(10)]


def test_progress_shows_mean_and_standard_error(capsys):
    mean = measured(range(10), progress=True, batch_size=10)["bpd"]
    assert f"bits/dim {mean['mean']:.4f} ± {mean['standard_error']:.4f}" in capsys.readouterr().err


def test_one_image_has_no_standard_error():
    found = measured([3])["bpd"]
    assert found["standard_error"] is None
    assert found["mean"] == pytest.approx(float(closed_form([3])), abs=5e-4)


def test_callers_levels_are_dequantised_and_floats_are_not():
    model = tiny.model(image_size=(4, 4), sigma_begin=1.0, n_sigmas=2)
    levels = LEVELS[:3]
    options = {"seed": 6, "start": 5, "rtol": 1e-2, "atol": 1e-2, "sigma_min": 0.3}
    found = image_log_likelihood(model, levels, **options)
    x = dequantise(levels, seed=6, samples=torch.arange(5, 8))
    for same in (
        x,
        levels.permute(0, 2, 3, 1).numpy(),
        [Image.fromarray(level[0].numpy()) for level in levels],
    ):
        assert torch.equal(image_log_likelihood(model, same, **options).nll, found.nll)
    plain = image_log_likelihood(model, levels.float() / 255, **options)
    assert not torch.equal(plain.nll, found.nll)
    direct = log_likelihood(
        model.score, x, 0.3, float(model.sigmas[0]), seed=6, samples=torch.arange(5, 8),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip
    assert torch.equal(direct.bpd, found.bpd)
    parts = image_log_likelihood(model, levels, batch_size=2, **options)
    torch.testing.assert_close(parts.bpd, found.bpd, rtol=1e-4, atol=1e-4)
    assert parts.latent.shape == (3, 1, 4, 4)


@pytest.mark.parametrize("size", [0, -1])
def test_batches_have_an_image_at_least(size):
    text = f"batch_size must be at least 1; got {size}"
    with pytest.raises(ValueError, match=text):
        image_log_likelihood(tiny.model(image_size=(4, 4)), LEVELS, batch_size=size)
    with pytest.raises(ValueError, match=text):
        measured(range(10), batch_size=size)


class Wall:
    """A score of zero, so that images stay; NaN for one of LEVELS."""

    def __init__(self, bad: int) -> None:
        self.mean = (float(LEVELS[bad].double().mean()) + 0.5) / 256

    def score(self, x, sigma):
        near = (x.flatten(1).mean(1) - self.mean).abs() < 0.0015
        return x * torch.where(near, torch.nan, 0.0)[:, None, None, None]


def test_an_image_without_likelihood_is_named_by_its_index(monkeypatch):
    """Not by its row in a batch; of a caller's images, by its place among them."""
    text = r"no likelihood of image 8 with rtol 1e-05 and atol 1e-05: .*row 2 .*looser tolerances"
    with pytest.raises(SamplingError, match=text):
        for _ in bits_per_dimension(
            Wall(8).score,
            datasets.MemoryImages(LEVELS),
            [0, 1, 2, 3, 6, 7, 8],
            SETTINGS,
            batch_size=4,
        ):
            pass
    model = tiny.model(image_size=(4, 4))
    monkeypatch.setattr(type(model), "score", Wall(8).score)
    with pytest.raises(SamplingError, match=text):
        image_log_likelihood(model, LEVELS, start=40, batch_size=3)


def test_no_images():
    model = tiny.model(image_size=(4, 4))
    assert image_log_likelihood(model, torch.zeros(0, 1, 4, 4)).bpd.shape == (0,)


def test_ends_of_the_flow():
    model = tiny.model()
    assert model_ends(model) == pytest.approx((0.01, 5.0))
    tutorial = tiny.model(
        arch="unet_a", image_size=(28, 28), act="swish", norm="GroupNorm", scale_input=False,
        sigma_min=0.01, sigma_max=22.0,
    )  # fmt: skip
    low, high = model_ends(tutorial)  # times 1e-3 and 1 of the published likelihood
    assert low == pytest.approx(1.245452e-3, rel=1e-6)
    assert high == pytest.approx(21.99999773, rel=1e-9)


def test_networks_that_know_levels_only_have_no_likelihood():
    model = tiny.model(arch="ncsn")
    with pytest.raises(ValueError, match="at its 4 levels and nowhere between them"):
        image_log_likelihood(model, torch.zeros(1, 1, 8, 8))


def test_images_read_here_have_eight_bits():
    assert (bits_per_dim.BITS, bits_per_dim.DATA_RANGE) == (8, (0.0, 1.0))
    assert np.iinfo(np.uint8).max == 2**bits_per_dim.BITS - 1


def test_samplers_answer_with_their_batch_size_and_options():
    sampler = Sampler(tiny.model(), engine="eager", batch_size=2)
    options = {"seed": 3, "start": 5, "rtol": 1e-2, "atol": 1e-2, "trace": "gaussian"}
    levels = LEVELS[:3].repeat(1, 1, 2, 2)
    found = sampler.log_likelihood(levels, **options)
    expected = image_log_likelihood(sampler.model, levels, batch_size=2, **options)
    assert torch.equal(found.bpd, expected.bpd)
    with pytest.raises(ValueError, match="no probability flow and no likelihood"):
        Sampler(tiny.model(arch="ncsn"), engine="eager").log_likelihood(levels)


def test_samplers_compute_on_their_device_and_threads(monkeypatch):
    """On another device than the model's, with a copy; the caller's model and threads stay."""
    seen = []

    def spy(score, x, low, high, *, samples, **options):
        model = score.__self__
        seen.append((model, model.device.type, x.device.type, torch.get_num_threads()))
        zeros = torch.zeros(len(x))
        return Likelihood(zeros, zeros, zeros, torch.zeros(x.shape), zeros, zeros)

    monkeypatch.setattr(bits_per_dim, "log_likelihood", spy)
    before = torch.get_num_threads()
    sampler = Sampler(tiny.model(), engine="eager", device="cpu", threads=before + 1)
    levels = LEVELS[:2].repeat(1, 1, 2, 2)
    sampler.log_likelihood(levels)
    assert seen.pop() == (sampler.model, "cpu", "cpu", before + 1)
    sampler.device = torch.device("meta")
    sampler.log_likelihood(levels)
    model, *found = seen.pop()
    assert found == ["meta", "meta", before + 1]
    assert model is not sampler.model
    assert sampler.model.device.type == "cpu"
    assert torch.get_num_threads() == before


def test_lines_that_are_no_likelihoods_are_done_again(tmp_path):
    good = b'{"index": 1, "bpd": 2.5, "nfe": 40}\n'
    path = tmp_path / "bits.jsonl"
    path.write_bytes(
        b'{"index": 2, "bpd": "x", "nfe": 40}\n{"index": 3, "bpd": NaN, "nfe": 40}\n'
        b'{"index": -1, "bpd": 2.5, "nfe": 40}\n{"index": 4, "bpd": 1e400, "nfe": 40}\n'
        b'{"index": true, "bpd": 2.5, "nfe": 40}\n{"index": [], "bpd": 2.5, "nfe": 40}\n'
        b"[]\nnull\n\xff\n" + b"[" * 10**5 + b"\n" + good + b'{"index": 5, "bp'
    )
    record = Record(path)
    assert list(record.found) == [1]
    assert record.figures(range(9))["bpd"]["n"] == 1
    assert path.read_bytes() == good
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="is a pipe or device"):
        Record(path)


def test_figures_of_each_class():
    labels = torch.tensor([1, 0, 1, 2, 1])
    images = datasets.MemoryImages(LEVELS[:5], labels, ("ant", "bee", "cat"))
    record = Record()
    record.found = {i: {"bpd": float(i), "nfe": 7} for i in range(4)}
    found = figures_by_class(record, images, range(1, 5))["bpd_by_class"]
    assert found == {
        "ant": {"mean": 1.0, "standard_error": None, "n": 1},
        "bee": {"mean": 2.0, "standard_error": None, "n": 1},
        "cat": {"mean": 3.0, "standard_error": None, "n": 1},
    }
    everything = figures_by_class(record, images, range(5))["bpd_by_class"]["bee"]
    assert (everything["mean"], everything["standard_error"], everything["n"]) == (1.0, 1.0, 2)
    assert figures_by_class(record, datasets.MemoryImages(LEVELS), range(4)) == {}
