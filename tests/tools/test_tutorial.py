"""tools/write_tutorial.py: epochs of a log, and the page."""

import json

import pytest
import tiny
from paths import ROOT, load_script
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

tutorial = load_script(ROOT / "tools" / "write_tutorial.py")


def log(folder, every, steps):
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step in range(every, steps + 1, every):
            board.add_scalar("loss", float((step - 1) // tutorial.STEPS) + (step % 2) / 4, step)


def test_only_whole_epochs_count(tmp_path):
    log(tmp_path, 625, 2 * 1875 + 625)
    assert tutorial.epochs(tmp_path) == pytest.approx([2 / 12, 1 + 1 / 12], abs=1e-3)


def test_entries_that_cross_epochs_are_refused(tmp_path):
    log(tmp_path, 100, 1000)
    with pytest.raises(SystemExit, match="--log-every must divide 1875; the run's is 100"):
        tutorial.epochs(tmp_path)


def test_page_and_check(tmp_path, monkeypatch):
    for name in ("RESULTS", "PAGE", "AGREEMENT"):
        monkeypatch.setattr(tutorial, name, tmp_path / name)
    tutorial.AGREEMENT.write_text(f"above\n{tutorial.BEGIN}\n{tutorial.END}\nbelow\n")
    assert tutorial.write(check=True)  # no results, no page
    bits = {"test": {"mean": 2.5, "standard_error": 0.01, "n": 64, "step": 3750}}
    tutorial.RESULTS.write_text(json.dumps({"epochs": [479.28, 95.705], "bits": bits}))
    assert not tutorial.write(check=True)
    assert not tutorial.write(check=False)
    assert tutorial.write(check=True)
    text = tutorial.PAGE.read_text()
    assert "| 1 | 479.3 | 479.3 | 1.000 |\n| 2 | 191.4 | 95.7 | 0.500 |\n" in text
    assert "| test | 64 | 2 | 2.500 ± 0.010 |" in text
    agreement = tutorial.AGREEMENT.read_text()
    assert "0.500 to 1.000\ntimes those that its notebook prints (95.7 and 191.4 in" in agreement
    text = "bits/dim after 2 epochs: 2.50 ± 0.01 (test); the notebook's, after 50: 2.30 to 2.44."
    assert text in agreement
    assert agreement.startswith("above\n")
    assert agreement.endswith(f"{tutorial.END}\nbelow\n")


def test_the_page_is_that_of_the_results():
    assert tutorial.write(check=True)


@pytest.mark.slow
def test_samples_of_the_three_samplers(tmp_path, monkeypatch):
    for settings in tutorial.SAMPLERS.values():
        if "steps" in settings:
            monkeypatch.setitem(settings, "steps", 3)
        if "rtol" in settings:
            monkeypatch.setitem(settings, "rtol", 0.1)
            monkeypatch.setitem(settings, "atol", 0.1)
    found = tutorial.samples(tiny.model(), tmp_path / "three.png")
    assert [s["method"] for s in found] == ["em", "pc", "ode"]
    assert [s["nfe"] for s in found][:2] == [3, 6]
    with Image.open(tmp_path / "three.png") as picture:
        assert picture.width > 2 * picture.height
    text = tutorial.page({"epochs": [], "samples": found})
    assert "| predictor-corrector | `pc` | steps 3, order predictor_first, snr 0.15," in text
