"""A few hundred damaged images; `python tests/fuzz/pictures.py N` checks more."""

import pictures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncsn_fast.data.decode import DataError


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_damaged_images_end_in_a_line_of_ours(first):
    result = pictures.run(100, first)
    assert not result["first_failures"]
    assert 0 < result["read"]["image"] < 100


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_line_of_ours(content):
    assert pictures.check(content)["entry"] in (True, False)


def test_the_same_seed_makes_the_same_file():
    assert pictures.mutate(3) == pictures.mutate(3)
    assert len({pictures.mutate(seed) for seed in range(50)}) == 50


@pytest.mark.parametrize("error", [IndexError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x")])
def test_other_errors_are_found(error, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(pictures, "make_mask", fail)
    with pytest.raises(AssertionError, match=f"mask: {type(error).__name__}"):
        pictures.check(pictures.corpus()[0])


def test_messages_without_the_file_are_found(monkeypatch):
    def fail(*args, **options):
        raise DataError("cannot decode <_io.BytesIO object>")

    monkeypatch.setattr(pictures, "make_mask", fail)
    with pytest.raises(AssertionError, match="mask: no file name"):
        pictures.check(pictures.corpus()[0])
