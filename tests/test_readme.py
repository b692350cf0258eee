"""README and the pages of docs/, word for word: commands and examples run, figures are measured."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import golden
import numpy as np
import pytest
from pages import PAGES, README, blocks, commands, links, name_of
from paths import ROOT
from PIL import Image

from ncsn_fast.__main__ import COMMANDS as COMMAND_NAMES
from ncsn_fast.cli import command as ncsn_command
from ncsn_fast.training import configs

sys.path.append(str(ROOT / "tools"))
import write_commands

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
COMMANDS = [*dict.fromkeys(command for page in PAGES for command in commands(page))]
EXAMPLES = {
    block: f"{name_of(page)}-{i}"
    for page in reversed(PAGES)  # README's name for what stands on two pages
    for i, block in enumerate(blocks(page, "python"))
}
TRAIN = "python -m ncsn_fast.train"
# A folder that a command reads -> the command that writes it.
WRITERS = {
    "model/": next(c for c in COMMANDS if "ncsn_fast.convert" in c),
    "runs/photos": next(c for c in COMMANDS if "--name photos" in c),
}
# One that reports and one that draws; all others are slow.
QUICK = ("python -m ncsn_fast.doctor", next(c for c in COMMANDS if "--out-dir samples/" in c))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: some photos, an authors' checkpoint, and the checkout's benchmarks."""
    where = tmp_path_factory.mktemp("reader")
    (where / "photos" / "summer").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), dtype=np.uint8)
    for i, photo in enumerate(pixels):
        Image.fromarray(photo).save(where / "photos" / "summer" / f"{i}.png")
    shutil.copy(golden.FOLDER / "ncsnv2_original.pth", where / "checkpoint.pth")
    (where / "benchmarks").symlink_to(ROOT / "benchmarks")
    return where


def test_make_commands_are_what_ci_runs() -> None:
    make = [command for command in COMMANDS if command.startswith("make ")]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert make == ["make demo", "make test"]
    assert {*make, "make test-slow", "make docs"} <= set(ci)


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command as the reader does: README's in processes of their own, others in this one."""
    program, flag, module, *arguments = [*command.split(), "", "", ""]
    if command not in commands(README) and (program, flag) == ("python", "-m"):
        monkeypatch.chdir(folder)
        words = [word for word in arguments if word]
        code = ncsn_command.run_module(module.removeprefix("ncsn_fast."), words)
        assert code == 0
    else:
        run_process(command, folder)
    for name in re.findall(r"--out (\S+)", command):
        assert (folder / name).stat().st_size > 0


def run_process(command: str, folder: Path) -> None:
    # At full size the benchmarks take an hour: here each runs once, small.
    small = {"PYTEST_ADDOPTS": "--small"} if "benchmarks/" in command else {}
    if "cache clear" in command:  # not the engines of whoever runs the tests
        small["XDG_CACHE_HOME"] = str(folder / "cache")
    words = command.split()
    while "=" in words[0]:
        name, value = words.pop(0).split("=")
        small[name] = value
    done = subprocess.run(
        words, cwd=folder, env=ENVIRONMENT | small, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] * (command not in QUICK))
        for command in COMMANDS
        if command != TRAIN and command.split()[0] != "make"
    ],
)
def test_command_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, writer in WRITERS.items():
        if f"--model {name}" in command and not (folder / name).exists():
            run(writer, folder, monkeypatch)
    run(command, folder, monkeypatch)


@pytest.mark.slow
def test_training_with_no_options_starts_and_ctrl_c_saves(tmp_path: Path) -> None:
    assert TRAIN in COMMANDS
    process = subprocess.Popen(TRAIN.split(), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    while b" 3/2000" not in seen:  # the progress bar has reached the third step
        byte = process.stderr.read(1)
        assert byte, seen.decode()
        seen += byte
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130, rest.decode()[-2000:]
    assert list((tmp_path / "runs" / "digits" / "checkpoints").glob("step_*.pt"))


# What must hold after an example that does not say so itself, by a line of it.
AFTER = {
    # Another micro-batch size may round differently; the samples are the same ones.
    "again = ": "assert images.shape == (16, 1, 16, 16) and len(pictures) == 4\n"
    "assert (again - images[12:]).abs().max() < 1e-3",
    "restore(": "assert found.shape == truth.shape and (found - truth).abs().mean() < 0.1",
    "wrap(net, predicts": "assert images.shape == (4, 3, 32, 32)\n"
    "assert model.score(images, 1.0).isfinite().all()",
    "describe()": "assert sampler.dtype == 'fp32' and sampler.plan(16).memory > 1e6",
}


@pytest.mark.slow
@pytest.mark.parametrize("example", [pytest.param(code, id=EXAMPLES[code]) for code in EXAMPLES])
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [check for line, check in AFTER.items() if line in example]
    program = "\n".join([example, *checks])
    assert re.search(r"^assert ", program, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, EXAMPLES[example], "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("tool", ["write_cards.py", "write_figures.py", "write_readme.py"])
def test_figures_are_the_measured_ones(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem) for p in write_commands.pages()])
def test_pages_of_commands_list_the_options(page: Path) -> None:
    """Those of --help, whose form depends on the version of tyro."""

    def options(text: str) -> list[str]:
        return re.findall(r"^ +(--[a-z-]+)", text, re.MULTILINE)

    told = options(write_commands.help_of(page.stem))
    assert told
    assert options(page.read_text()) == told


def test_readme_is_of_one_screen() -> None:
    assert len(README.read_text().splitlines()) <= 150
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text())
    with Image.open(ROOT / picture) as image:
        assert image.width > 400


def test_versions_are_those_of_pyproject() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M) == [version]
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest == version


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / n for n in ("SECURITY.md", "CONTRIBUTING.md"))], ids=name_of
)
def test_links_lead_to_files(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing
    anywhere = [target for target in links(page) if target.startswith("/")]
    assert not anywhere


def test_pages_are_in_the_site() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page != README}
    # The record of one experiment is written when it was run; the site finds it by its search.
    assert pages - {"tutorial.md"} <= listed
    assert {f"commands/{name}.md" for name in COMMAND_NAMES} <= listed


def test_every_extra_is_told() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = re.findall(r"^\| `\.\[(\w+)\]`", (ROOT / "docs" / "install.md").read_text(), re.M)
    assert sorted(told) == sorted(extras["optional-dependencies"])


def test_every_configuration_is_told() -> None:
    text = (ROOT / "docs" / "tutorials" / "your-images.md").read_text()
    assert not [name for name in configs.CONFIGS if not re.search(rf"\b{name}\b(?!-)", text)]
    (table,) = re.findall(r"^\| models .*?\n\n", README.read_text(), re.M | re.S)
    named = re.findall(r"`(?:--config )?([a-z]+[a-z0-9]*(?:-[a-z0-9]+)*)`(?=[^|]*\|$)", table, re.M)
    assert len(named) > 10
    assert set(named) <= set(configs.CONFIGS)


COLUMNS = ("path", "condition", "test", "benchmark")


def test_fast_paths_have_a_condition_a_test_and_a_benchmark() -> None:
    text = (ROOT / "docs" / "fast-paths.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]  # fmt: skip
    rows = [row for row in rows if row != list(COLUMNS)]
    assert len(rows) > 10
    for row in rows:
        path, condition, test, benchmark = row
        assert condition, row
        assert "`" in path, row
        files = re.findall(r"`([\w./]+/[\w.]+)`", f"{path} {test} {benchmark}")
        assert not [name for name in files if not (ROOT / name).exists()], row
        assert re.fullmatch(r"`tests/\S+/test_\w+\.py`", test), row
        assert re.fullmatch(r"`benchmarks/\S+\.py`|none", benchmark), row


def test_messages_on_the_page_of_platforms_are_those_of_the_package() -> None:
    text = (ROOT / "docs" / "platforms.md").read_text()
    messages = re.findall(r'(?<!=)"([^"`]+)"', text)
    source = "\n".join(path.read_text() for path in (ROOT / "ncsn_fast").rglob("*.py"))
    assert len(messages) >= 4
    assert not [message for message in messages if message not in source]
