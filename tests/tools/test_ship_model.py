"""tools/ship_model.py and tools/write_cards.py: from a training run to a model that ships."""

import json
import re

import pytest
import tiny
import torch
from idx_files import folder_of_digits
from paths import ROOT, load_script

import ncsn_fast
from ncsn_fast import Sampler
from ncsn_fast.checkpoints import shipped as shipping
from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.evaluation import features
from ncsn_fast.training.configs import CONFIGS

ship = load_script(ROOT / "tools" / "ship_model.py")
cards = load_script(ROOT / "tools" / "write_cards.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(folder_of_digits(tmp_path_factory.mktemp("data") / "mnist", 60, size=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps with two averages."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    trainer = tiny.trainer(ema_halflife=(10.0, 4000.0))
    for _ in range(3):
        trainer.train_step(tiny.IMAGES[:8])
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(trainer.state_dict(), folder / "checkpoints" / "step_00000003.pt")
    return folder


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "ASSETS", tmp_path)
    return tmp_path


def test_a_folder_is_all_that_a_model_needs_to_ship(assets, run, data, monkeypatch):
    with pytest.raises(CheckpointError, match=r"or one that ships: $"):
        ncsn_fast.load("small")
    assert ship.main(["weights", str(run), "--data", data, "--assets", str(assets)]) == 0
    assert [*shipping.shipped()] == ["small"]
    model = ncsn_fast.load("small")
    assert Sampler("small", engine="eager").model.digest() == model.digest()
    record = json.loads((assets / "small" / "record.json").read_text())
    assert record["model"] == model.digest()
    assert (record["step"], record["images_seen"], record["bytes"] < 2e5) == (3, 24, True)
    losses, chosen = (record["held_out"][key] for key in ("losses", "chosen"))
    assert {*losses} == {"raw", "10", "4000"}
    assert losses[chosen] == min(losses.values())
    stored = ship.candidates(ship.read_run(run))[chosen]
    weight = model.state_dict()["net.end_conv.weight"]
    assert torch.equal(weight, stored["net.end_conv.weight"].half().float())
    assert len(record["data"]) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in record["data"].values())

    # the digits' classifier in place of MNIST's
    monkeypatch.setattr(ship, "load_extractor", lambda _: features.load_extractor("digits"))
    call = ["figures", "small", "--data", data, "--assets", str(assets), "--n", "20"]
    call += ["--methods", "cas", "--engines", "eager"]
    assert ship.main(call) == 0
    path = assets / "small" / "figures-cas-eager.json"
    found = json.loads(path.read_text())
    assert (found["model"], found["figures"]["n"]) == (model.digest(), 20)
    assert (assets / "small" / "neighbours.png").exists()
    before = path.stat().st_mtime_ns
    assert ship.main(call) == 0
    assert path.stat().st_mtime_ns == before  # nothing is drawn twice

    text = cards.card(assets / "small")
    assert record["command"] in text
    for digest in record["data"].values():
        assert digest in text
    assert "| shipped small model | `cas`, eager fp32 | real test digits |" in text
    assert "first sixteen samples (`cas`, seed 0)" in text
    assert "CC BY-SA 3.0" in text

    # the picture keeps its method, whatever comes first of the figures
    other = {**found, "sampling": {**found["sampling"], "method": "ald"}}
    (assets / "small" / "figures-ald-eager.json").write_text(json.dumps(other))
    assert "first sixteen samples (`cas`, seed 0)" in cards.card(assets / "small")

    # other weights: their figures are to be drawn again
    ship.main(["weights", str(run), "--data", data, "--assets", str(assets)])
    assert {p.name for p in (assets / "small").iterdir()} == {
        "config.json", "model.safetensors", "record.json"
    }  # fmt: skip
    assert "## Figures" not in cards.card(assets / "small")


def test_files_that_are_too_large_do_not_ship(assets, run, data):
    with pytest.raises(SystemExit, match=r"at most 0\.001 ship"):
        ship.weights(run, assets / "small", data, most=0.001)


def test_commands_are_what_differs_from_the_configuration():
    config = json.loads(CONFIGS["mnist"].to_json())
    config |= {"steps": 123, "data": "elsewhere", "threads": 1, "ema_halflife": [100.0, 5.5]}
    assert ship.command(config) == (
        "python -m ncsn_fast.train --config mnist --data MNIST --steps 123 --ema-halflife 100.0 5.5"
    )
    older = {**config, "autocast": True, "ema_halflife": None, "batch_size": 32}
    assert ship.command(older).endswith("--data MNIST --batch-size 32 --steps 123")


def test_cards_are_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["write_cards.py", "--check"])
    assert cards.main() == 0, capsys.readouterr().out
