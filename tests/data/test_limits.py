"""Bounds on what files may declare, and the page that states them."""

import pytest
from paths import ROOT

from ncsn_fast.data import limits
from ncsn_fast.data.limits import LIMITS, Limit

BYTES = Limit("NCSN_FAST_TEST_BYTES", 1000, "bytes", "bytes of a test")
COUNT = Limit("NCSN_FAST_TEST_COUNT", 7, "rows", "rows of a test")


def test_what_is_within_the_bound_passes():
    BYTES.check(1000, "a.bin")
    COUNT.check(7, "a.csv")
    COUNT.check(0, "a.csv")


def test_what_is_beyond_says_how_to_raise_it(monkeypatch):
    with pytest.raises(OSError, match=r"^a\.bin declares 123,456 bytes, and at most 1,000") as said:
        BYTES.check(123_456, "a.bin", OSError)
    variable, _, value = str(said.value).rpartition(" ")[2].partition("=")
    monkeypatch.setenv(variable, value)
    BYTES.check(123_456, "a.bin")
    with pytest.raises(ValueError, match="123,457 bytes"):
        BYTES.check(123_457, "a.bin")


@pytest.mark.parametrize(("text", "value"), [("", 7), ("12", 12), (" 5 ", 5), ("0", 0)])
def test_counts_of_the_environment(monkeypatch, text, value):
    monkeypatch.setenv(COUNT.variable, text)
    assert COUNT.value() == value


@pytest.mark.parametrize(
    ("text", "value"), [("2kB", 2000), ("1 MiB", 2**20), ("1.5GB", 1_500_000_000)]
)
def test_sizes_of_the_environment(monkeypatch, text, value):
    monkeypatch.setenv(BYTES.variable, text)
    assert BYTES.value() == value


@pytest.mark.parametrize("text", ["-1", "many", "1e9", "9" * 400, "nan"])
@pytest.mark.parametrize("limit", [BYTES, COUNT], ids=["bytes", "rows"])
def test_what_is_no_number_is_refused(monkeypatch, limit, text):
    monkeypatch.setenv(limit.variable, text)
    with pytest.raises(ValueError, match=f"{limit.variable} must be a (size|number of rows) such"):
        limit.check(1, "a")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (10**13, "10000.0 GB")],
)
def test_size_text(size, text):
    assert limits.size_text(size) == text


def test_the_page_states_every_limit():
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line[:1] == "|"]
    for limit in LIMITS:
        row = f"| {limit.about} | {limit.default:,} {limit.unit} | `{limit.variable}` |"
        assert row in rows
