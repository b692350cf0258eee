"""Results that outlive a failed write."""

import re
from pathlib import Path

import pytest

from ncsn_fast.data.rescue import write_or_keep


def test_what_can_be_written_is_written(tmp_path):
    write_or_keep(tmp_path / "a.txt", lambda path: path.write_text("result"))
    assert (tmp_path / "a.txt").read_text() == "result"


def test_another_place_is_named(tmp_path):
    with pytest.raises(OSError, match=r"not lost: it is in \S+/a\.txt; move it") as raised:
        write_or_keep(tmp_path / "no" / "a.txt", lambda path: path.write_text("result"))
    found = re.search(r"it is in (\S+);", str(raised.value))
    assert found is not None
    assert Path(found[1]).read_text() == "result"


def test_where_no_place_takes_it_the_first_error_remains(tmp_path, full_disk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with full_disk(3), pytest.raises(OSError, match="File too large") as raised:
        write_or_keep(tmp_path / "a.txt", lambda path: path.write_text("result"))
    assert "not lost" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
