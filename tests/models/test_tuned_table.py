"""TunedTable: what it refuses, its JSON, and that it travels with its model."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import tiny

import ncsn_fast
from ncsn_fast import CheckpointError
from ncsn_fast.checkpoints.model_folder import TABLE_NAME
from ncsn_fast.models.tuned_table import TunedTable

TABLE = TunedTable(
    sigmas=(5.0, 1.0, 0.2, 0.02), eta=(1.0, 4.0, 0.5), history=(1.0, 0.5, 1.5), s_noise=1.01,
    shape=(1, 8, 8), final=0.3, mean=tuple(np.linspace(0, 1, 64).round(4).tolist()),
    facts={"loss": "energy", "before": [0.1, 0.2]},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model = tiny.model()
    model.tuned = TABLE
    return model.save_pretrained(tmp_path / "model")


def test_json_round_trip():
    text = json.dumps(TABLE.to_dict())
    again = TunedTable.from_dict(json.loads(text))
    assert (again, again.facts) == (TABLE, TABLE.facts)
    assert len(text) < 2000
    plain = dataclasses.replace(TABLE, mean=None)
    assert TunedTable.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert plain.mean_image() is None
    assert TABLE.mean_image().shape == (1, 8, 8)


def test_digests_tell_samples_apart():
    assert dataclasses.replace(TABLE, facts={}).digest() == TABLE.digest()
    assert dataclasses.replace(TABLE, s_noise=1.02).digest() != TABLE.digest()
    assert dataclasses.replace(TABLE, final=0.0).digest() != TABLE.digest()


def test_tables_of_the_first_version_end_at_the_denoisers_output():
    old = {k: v for k, v in TABLE.to_dict().items() if k != "final"}
    assert TunedTable.from_dict({**old, "version": 1}) == dataclasses.replace(TABLE, final=0.0)
    with pytest.raises(ValueError, match=r"missing or unknown fields: \['final'\]"):
        TunedTable.from_dict(old)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigmas": (5.0,), "eta": (), "history": ()}, "2 to 1000 rows; got 1"),
        ({"sigmas": (5.0, 1.0, 1.0, 0.02)}, "sigmas must be descending"),
        ({"sigmas": (5.0, 1.0, math.nan, 0.02)}, "positive and finite"),
        ({"sigmas": (1e200, 1.0, 0.2, 0.02)}, r"levels must be in \[1e-09, 1e\+09\]; got 1e\+200"),
        ({"eta": (1.0, 4.0)}, "eta must have 3 numbers, one for each step between 4 levels; got 2"),
        ({"history": (1.0,) * 4}, "history must have 3 numbers"),
        ({"eta": (1.0, -4.0, 0.5)}, r"eta must be in \[0, 100\]; got \[1.0, -4.0, 0.5\]"),
        ({"eta": (1.0, math.nan, 0.5)}, r"eta must be in \[0, 100\]"),
        ({"history": (1.0, 11.0, 0.5)}, r"history must be in \[-10, 10\]"),
        ({"s_noise": math.nan}, r"s_noise must be in \(0, 10\]; got nan"),
        ({"final": math.nan}, r"final must be in \[-10, 10\]; got nan"),
        ({"final": -11.0}, r"final must be in \[-10, 10\]; got -11"),
        ({"s_noise": 1.2}, r"noise .* at level 1, more than 10% off; s_noise 1.2 is too far"),
        ({"mean": (0.5,) * 63}, r"mean must be an image \(1, 8, 8\), .*; got 63"),
        ({"mean": (math.inf,) * 64}, "the mean holds NaN or infinite values"),
    ],
)
def test_numbers_that_are_no_sampler_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TABLE, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "has version 3, and this package reads 2: update"),
        ({"version": "1"}, "got version '1' of 'fast'"),
        ({"method": "ald"}, "expected a table of method fast; got version 2 of 'ald'"),
        ({"sigma": []}, r"missing or unknown fields: \['sigma'\]"),
        ({"eta": None}, "eta must be numbers; got None"),
        ({"eta": [1.0, True, 1.0]}, "eta must be numbers"),
        ({"s_noise": "1"}, "s_noise must be numbers"),
        ({"final": None}, "final must be numbers"),
        ({"shape": [1, 8]}, "shape must be three integers"),
        ({"facts": []}, "facts must be an object; got list"),
    ],
)
def test_other_json_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TunedTable.from_dict({**TABLE.to_dict(), **change})


def test_tables_travel_with_their_models(folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", TABLE_NAME, "model.safetensors",
    ]  # fmt: skip
    loaded = ncsn_fast.load(folder)
    assert loaded.tuned == TABLE
    assert copy.deepcopy(loaded).tuned == TABLE
    again = ncsn_fast.load(loaded.save_pretrained(tmp_path / "again"))
    assert again.tuned == TABLE
    assert again.digest() == tiny.model().digest()  # that of the network


def test_a_table_does_not_stay_with_another_model(folder):
    tiny.model(seed=1).save_pretrained(folder)
    assert not (folder / TABLE_NAME).exists()
    assert ncsn_fast.load(folder).tuned is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [1, 4, 4], "mean": None}, r"fitted on images \(1, 4, 4\); the model's are"),
        ({"sigmas": [6.0, 1.0, 0.2, 0.02]}, "its levels go from 6 to 0.02; the model's from 5 to"),
        ({"sigmas": [5.0, 1.0, 0.2, 0.001]}, "its levels go from 5 to 0.001"),
        ({"s_noise": 9.0}, "s_noise 9 is too far from 1"),
        (None, "is not a JSON object|Expecting value"),
    ],
)
def test_folders_with_a_bad_table_are_refused(folder, change, words):
    text = "nothing" if change is None else json.dumps({**TABLE.to_dict(), **change})
    (folder / TABLE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=words) as refused:
        ncsn_fast.load(folder)
    assert str(refused.value).startswith(f"cannot use {folder / TABLE_NAME}: ")
    assert "Delete it" in str(refused.value)
