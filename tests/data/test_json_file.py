"""JSON that is plain data of a bounded size, or an error that says why it is not."""

import dataclasses
import os
from fractions import Fraction

import numpy as np
import pytest

from ncsn_fast.data import limits
from ncsn_fast.data.json_file import JSONError, make_plain, parse_json, plain, read_json

REFUSED = {
    '{"a": 1e400}': "the number 1e400 is not finite",
    '{"a": -1E+309}': "the number -1E.309 is not finite",
    '{"a": NaN}': "the number NaN is not finite",
    '{"a": -Infinity}': "the number -Infinity is not finite",
    '{"a": 9223372036854775808}': "the integer 9223372036854775808 has more than 64 bits",
    '{"a": -9223372036854775809}': "has more than 64 bits",
    f'{{"a": {"9" * 10**5}}}': r"the integer 9{20}\.\.\. has more than 64 bits",
    '{"a": 1, "b": 2, "a": 3}': "'a' is there twice",
    '{"a": {"b": 1, "b": 1}}': "'b' is there twice",
    "[" * 10**5: "nested too deeply",
    '{"a":' * 10**5: "nested too deeply",
    "[1]": "expected a JSON object; got list",
    "null": "expected a JSON object; got NoneType",
    "": "Expecting value",
    "{": "Expecting property name",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:24])
def test_refused_texts(text):
    with pytest.raises(JSONError, match=rf"cannot use x.json: .*{REFUSED[text]}"):
        parse_json(text, "x.json")


def test_plain_values():
    text = '{"a": -9223372036854775808, "b": [1.5e3, null, true, {}], "c": 9223372036854775807}'
    assert parse_json(text, "") == {"a": -(2**63), "b": [1500.0, None, True, {}], "c": 2**63 - 1}
    found = parse_json('{"a": Infinity, "b": 1e999}', "", finite=False)
    assert found == {"a": float("inf"), "b": float("inf")}


def test_files_that_are_no_json(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError):
        read_json(path)
    os.mkfifo(path)  # nobody writes into it: to open it would take for ever
    with pytest.raises(JSONError, match=r"cannot read .*x\.json is a pipe or device"):
        read_json(path)
    path.unlink()
    path.write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(JSONError, match=r"cannot read .*x\.json: 'utf-8' codec"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    monkeypatch.setenv(limits.JSON_BYTES.variable, "7")
    with pytest.raises(JSONError, match=r"x\.json declares 8 bytes, and at most 7 are read"):
        read_json(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3), (np.float32(0.5), 0.5), (np.True_, True), (Fraction(1, 4), 0.25),
        (True, True), ((np.uint8(1), "a"), (1, "a")), ("1", "1"), (None, None),
        ([1], [1]), ({"a": [np.float32(2)]}, {"a": [2.0]}),
    ],
)  # fmt: skip
def test_numbers_become_python_s_own(value, expected):
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert [type(item) for item in found] == [type(item) for item in expected]


def test_numbers_of_a_dataclass_become_those_of_its_fields():
    @dataclasses.dataclass(frozen=True)
    class Config:
        size: "int"
        rate: "float" = 2
        flag: "float" = True
        large: "float" = 10**400

        def __post_init__(self):
            make_plain(self)

    kinds = [type(value) for value in vars(Config(np.int64(3))).values()]
    assert kinds == [int, float, bool, int]
