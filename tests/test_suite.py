"""The suite itself: what `make test` and `make test-all` take of it."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest
from cross_section import cross_section
from paths import ROOT

pytest_plugins = ["pytester"]

TESTS = """
    import pytest

    @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a(x): pass

    @pytest.mark.slow
    def test_b(): pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A checkout of a quick and two slow tests, with our settings of pytest."""
    (pytester.path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    pytester.makepyfile(**{"tests/test_it": TESTS})
    return pytester


def options_of(target: str) -> list[str]:
    """Options that the Makefile's recipe of a target adds to those of both."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^SUITE := .* -m pytest -n auto --dist worksteal$", makefile, re.MULTILINE)
    (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    before, _, options = recipe.partition("$(SUITE)")
    assert before == "\t"
    return shlex.split(options)


@pytest.mark.parametrize(
    ("target", "passed"), [("test", 1), ("test-slow", 2), ("test-all", 3), (None, 3)], ids=str
)
def test_slow_tests_are_left_out_by_make_test_alone(
    suite: pytest.Pytester, target: str | None, passed: int
) -> None:
    options = [] if target is None else options_of(target)
    suite.runpytest_inprocess(*options).assert_outcomes(passed=passed, deselected=3 - passed)


AXES = [("ab", "xyz"), ("abcde", "xy", "12"), ("a",), ("ab", "xy", "1234")]


@pytest.mark.parametrize("axes", AXES)
def test_cross_sections_have_every_value(axes: tuple[str, ...]) -> None:
    found = cross_section(*axes)
    assert [p.values for p in found] == list(itertools.product(*axes))
    quick = [p.values for p in found if not p.marks]
    assert [set(column) for column in zip(*quick, strict=True)] == [set(axis) for axis in axes]
    assert len(quick) == max(map(len, axes))


def test_short_axes_of_a_cross_section_are_combined() -> None:
    quick = [p.values for p in cross_section("abcde", "xy", "12") if not p.marks]
    assert {values[1:] for values in quick} == set(itertools.product("xy", "12"))


def test_cross_sections_of_what_there_is() -> None:
    found = cross_section("abc", "xyz", where=lambda a, b: a == "a" or b == "x")
    assert {p.values for p in found} == {("a", "x"), ("a", "y"), ("a", "z"), ("b", "x"), ("c", "x")}
    assert not any(p.marks for p in found)
