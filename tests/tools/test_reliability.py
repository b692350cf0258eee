"""tools/write_reliability.py: the page says what was measured, and nothing that was not."""

import json
import sys

import pytest
from paths import ROOT, load_script

CAMPAIGN = {
    "machine": {"cpu": "Quick CPU", "cores": 2, "ncsn_fast": "0.1", "commit": "ab"},
    "training": {"kills": 120, "steps_compared_bit_for_bit": 1780, "seconds": 1.0},
    "sampling": {"kills": 80, "files_compared": 4506, "seconds": 1.0},
    "soak": {"samples": 10_000, "engine": "cpu", "growth_mb": 2.3, "seconds": 1.0},
    "threads": {"calls": 400, "threads": 4, "samplers": 2, "seconds": 1.0},
}  # fmt: skip


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The script, where there are neither results nor a page."""
    found = load_script(ROOT / "tools" / "write_reliability.py")
    monkeypatch.setattr(found, "RESULTS", tmp_path)
    monkeypatch.setattr(found, "LEAST_FILES", 150_000 * len(found.KINDS))
    monkeypatch.setattr(found, "PAGE", tmp_path / "reliability.md")
    return found


def figures(**changes):
    return {"executions": 150_000, "failures": 0, "peak_mb": 1427} | changes


def give(tool, fuzz_changes=None, campaign=CAMPAIGN, leave_out=()):
    """Writes results, with changed figures of one kind of file."""
    kinds = {kind: figures() for kind in tool.KINDS if kind not in leave_out}
    if fuzz_changes is not None:
        kinds["pictures"] |= fuzz_changes
    fuzz = {"versions": {"python": "3.11.7", "PIL": "13.0.0"}, "kinds": kinds}
    (tool.RESULTS / tool.CAMPAIGN).write_text(json.dumps(campaign))
    (tool.RESULTS / tool.FUZZ).write_text(json.dumps(fuzz))


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["write_reliability.py", *arguments])
    return tool.main()


def test_kinds_are_those_of_the_fuzzer(tool):
    assert tool.KINDS.keys() == load_script(ROOT / "tools" / "fuzz.py").KINDS.keys()
    assert tool.KINDS.keys() == {
        path.stem for path in (ROOT / "tests" / "fuzz").glob("*.py")
        if "def mutate(" in path.read_text()
    }  # fmt: skip


def test_the_page_is_written_and_checked(tool, monkeypatch, capsys):
    assert run(tool, monkeypatch, "--check") == 0  # nothing measured, nothing said
    give(tool)
    assert run(tool, monkeypatch, "--check") == 1
    assert run(tool, monkeypatch) == 0
    assert run(tool, monkeypatch, "--check") == 0
    page = tool.PAGE.read_text()
    for text in (
        "120 kills", "after 1,780 steps", "4,506 files", "10,000 samples", "by 2.3 MB",
        "400 calls, 4 threads, 2 samplers", "| 150,000 | 0 | 1,427 MB |",
        f"| *all* | {tool.LEAST_FILES:,} | 0 | |", "commit ab", "Quick CPU with 2 cores",
        "PIL 13.0.0",
    ):  # fmt: skip
        assert text in page, text
    assert max(map(len, page.splitlines())) < 250
    give(tool, campaign={**CAMPAIGN, "soak": {**CAMPAIGN["soak"], "growth_mb": 9}})
    assert run(tool, monkeypatch, "--check") == 1
    assert "out of date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fuzz_changes": {"executions": 20_000}}, "files; make fuzz goes on"),
        ({"fuzz_changes": {"failures": 3}}, "fuzz.json has failures of pictures"),
        ({"leave_out": ["onnx_files"]}, "differ in onnx_files; make fuzz goes on"),
        ({"campaign": {"machine": {}, "training": {}}}, "has no sampling, soak, threads"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_what_is_not_whole_is_not_written(tool, monkeypatch, capsys, arguments, text, check):
    give(tool, **arguments)
    assert run(tool, monkeypatch, *["--check"] * check) == 1
    assert text in capsys.readouterr().err
    assert not tool.PAGE.exists()


def test_a_page_without_results_is_refused(tool, monkeypatch, capsys):
    tool.PAGE.write_text("old")
    assert run(tool, monkeypatch, "--check") == 1
    assert "campaign.json is missing" in capsys.readouterr().err


def test_readers_are_led_to_the_page():
    if (ROOT / "docs" / "reliability.md").exists():
        for page in ("README.md", "SECURITY.md"):
            assert "(docs/reliability.md)" in (ROOT / page).read_text(), page
    else:
        assert "reliability.md" not in (ROOT / "README.md").read_text()
