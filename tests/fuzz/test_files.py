"""Some damaged files of every kind; `make fuzz` checks more (tools/fuzz.py)."""

import importlib

import harness
import pytest

# How many fit into a second or two, and the readers that must have taken some of them.
PARSERS = {
    "json_texts": (160, {"config", "settings", "record", "search"}),
    "statistics_files": (400, {"statistics"}),
    "data_sets": (300, {"train-images-idx3-ubyte", "a.npy", "a.npz", "train", "a.tar"}),
    "safetensors_files": (100, {"model", "extractor"}),
    "published_files": (40, {"averaged", "raw"}),
    "score_sde_files": (40, {"averaged", "raw"}),
    "edm_pickles": (150, {"model"}),
    "diffusers_folders": (30, {"model"}),
    "run_checkpoints": (30, {"model", "resume"}),
    "onnx_files": (40, {"ort"}),
}


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_end_in_a_line_of_ours(name):
    parser, (n, readers) = importlib.import_module(name), PARSERS[name]
    result = harness.run(parser.mutate, parser.check, n)
    assert not result["first_failures"]
    assert all(0 < result["read"][reader] <= n for reader in readers)


@pytest.mark.parametrize("name", PARSERS)
def test_the_same_seed_makes_the_same_file(name):
    mutate = importlib.import_module(name).mutate
    assert mutate(3) == mutate(3)
    assert len({mutate(seed) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (IndexError("x"), r"IndexError\('x'\)"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), "UnicodeDecodeError"),
        (ValueError("a.json: no\nmore"), "several lines"),
        (ValueError("nothing"), "no file name: nothing"),
    ],
)
def test_other_errors_are_found(error, fault):
    def fail():
        raise error

    with pytest.raises(AssertionError, match=f"reader: {fault}"):
        harness.reads("reader", fail, (ValueError,), "a.json")
    assert not harness.reads("reader", lambda: int("x"), (ValueError,))
    assert harness.reads("reader", lambda: 1, ())


def test_failures_are_counted_and_named():
    def check(content):
        if content == b"3":
            raise AssertionError("three")
        return {"all": True, "even": int(content) % 2 == 0}

    result = harness.run(lambda seed: str(seed).encode(), check, 6, 1)
    assert result["failures"] == 1
    assert result["first_failures"] == ["seed 3: three"]
    assert result["read"] == {"all": 5, "even": 3}
