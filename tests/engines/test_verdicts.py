"""Precision checks that are remembered, and the images that they look at."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from drawing import tiny
from engine_cases import SMALLEST

from ncsn_fast import Sampler
from ncsn_fast.engines import precision, verdicts
from ncsn_fast.engines.base import PrecisionError
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.probe_images import probe_images

remembered = verdicts.remembered  # before the fixture that makes every check


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and the folder of its verdicts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ncsn_fast" / "precision"


@pytest.fixture
def checks(cache, monkeypatch):
    """Dtypes of the engines that are checked, with a cache that was empty."""
    made, real = [], precision.check_precision
    monkeypatch.setattr(verdicts, "remembered", remembered)
    monkeypatch.setattr(
        precision, "check_precision", lambda e, *args: made.append(e.dtype) or real(e, *args)
    )
    return made


@pytest.mark.parametrize("convolutions", ["direct", "winograd"])
@pytest.mark.parametrize(
    ("arch", "dtype"), [("ncsnv2", "fp32"), ("ncsnv2", SMALLEST), ("ncsn", "fp32")]
)
def test_an_engine_that_is_not_checked_again_computes_the_same(checks, arch, convolutions, dtype):
    of, x = tiny(arch=arch, ngf=8), torch.rand(2, 3, 8, 8)
    checked, not_again = (
        CpuEngine(of, device=x.device, dtype=dtype, batch_size=2, convolutions=convolutions)
        for _ in range(2)
    )
    assert checks == [dtype]
    level = of.condition(of.sigmas[:2])
    assert torch.equal(not_again.output(x, level), checked.output(x, level))
    assert torch.equal(not_again.resized(1).output(x, level), checked.resized(1).output(x, level))


def test_a_model_is_checked_once_for_each_algorithm(checks):
    def build(of, **options):
        return Sampler(of, engine="cpu", device="cpu", **options).engine_for(1).error

    of = tiny()
    first = build(of, dtype="fp32", convolutions="direct")
    assert build(of, dtype="fp32", convolutions="direct") == first
    assert checks == ["fp32"]
    build(of, dtype="fp32", convolutions="winograd")
    build(of, dtype="fp32", convolutions="direct")
    assert checks == ["fp32", "fp32"]
    with torch.no_grad():
        of.net.end_conv.weight.mul_(1.5)
    build(of, dtype="fp32", convolutions="direct")
    assert checks == ["fp32"] * 3


def test_a_refusal_is_remembered_with_its_words(cache):
    made = []

    def check():
        made.append(1)
        raise PrecisionError("differs by 1 at sigma 2", "use dtype='fp32'")

    for _ in range(2):
        with pytest.raises(PrecisionError, match=r"^differs by 1 at sigma 2; use") as caught:
            remembered({"model": "a"}, check)
        assert caught.value.reason == "differs by 1 at sigma 2"
    assert made == [1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b"null",
        b'{"error": 1e999}',
        b'{"error": -1}',
        b'{"error": "0.1"}',
        b'{"error": 1' + b"0" * 400 + b"}",
        b'{"refused": []}',
        b'{"refused": ["a"]}',
        b'{"refused": ["a", 1]}',
        b"[" * 50_000,
        b'{"error": true, "error": 1}',
    ],
)
def test_damaged_verdicts_are_made_anew(cache, content):
    assert remembered({"model": "a"}, lambda: 0.25) == 0.25
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert remembered({"model": "a"}, lambda: 0.5) == 0.5
    assert json.loads(path.read_text())["error"] == 0.5


def test_a_cache_that_cannot_be_written_costs_a_check_and_no_more(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert [remembered({"model": "a"}, lambda: 0.25) for _ in range(2)] == [0.25, 0.25]


def test_probe_images_have_edges_flat_parts_and_the_spectrum_of_photographs():
    for image in probe_images():
        pixels = np.asarray(image, dtype=np.float64) / 255
        assert (image.mode, pixels.min() < 0.05, pixels.max() > 0.95) == ("RGB", True, True)
        grey = pixels.mean(axis=2)
        steps = np.abs(np.diff(grey, axis=1))
        assert (steps == 0).mean() > 0.5
        assert (steps > 0.2).mean() > 0.01
        power = np.abs(np.fft.fft2(grey[:, :240] - grey.mean())) ** 2
        rows = np.fft.fftfreq(240)[:, None]
        frequency = np.hypot(rows, rows.T)
        bands = np.geomspace(2 / 240, 0.4, 12)
        shells = list(itertools.pairwise(bands))
        spectrum = [power[(a <= frequency) & (frequency < b)].mean() for a, b in shells]
        slope = np.polyfit(np.log([a * b for a, b in shells]) / 2, np.log(spectrum), 1)[0]
        assert -3.2 < slope < -1.6  # photographs: about -2, dead leaves with smallest discs: -2..-3
