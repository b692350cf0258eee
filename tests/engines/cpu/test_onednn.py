"""Private names of torch: what is missing or changed is found before an address is called."""

import ctypes
import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from engine_cases import CPU, model
from paths import ROOT

from ncsn_fast import EngineUnavailable, Sampler, engines
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.eager import EagerEngine

RUN = subprocess.run
UNTESTED = ("0.0.",)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Nothing is known of this torch yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = (onednn.problem, onednn._found, onednn.lacks)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def children(monkeypatch):
    """Replaces the program of the child process; lists what was started."""
    started: list[list[str]] = []

    def replace(program: str) -> None:
        def run(command, **options):
            started.append(command)
            return RUN([command[0], "-c", program], **options)

        monkeypatch.setattr(onednn, "TESTED", UNTESTED)
        monkeypatch.setattr(subprocess, "run", run)

    replace.started = started
    return replace


MISSING = {
    "function": ("_FUNCTIONS", ("aoti_torch_gone", "aoti_torch_delete_tensor_object")),
    "pack": ("_PACK", "_reorder_gone"),
    "add": ("_ADD", "_convolution_gone"),
    "capsules": ("_capsules", lambda: None),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_name_costs_the_engine_and_nothing_else(what, monkeypatch, caplog):
    monkeypatch.setattr(onednn, *MISSING[what])
    words = r"torch \S+ does not have \S*(gone|unsafe_alloc_void)\S*( and \S+)?; install torch 2"
    with pytest.raises(EngineUnavailable, match=words):
        Sampler(model(), engine="cpu")
    with pytest.raises(RuntimeError, match=words):
        CpuEngine(model(), device=CPU, dtype="fp32", batch_size=1)
    with caplog.at_level(logging.WARNING):
        sampler = Sampler(model(), device="cpu", batch_size=2)
    (record,) = [r for r in caplog.records if r.name.startswith("ncsn_fast")]
    assert record.getMessage().startswith("engine eager (engine 'cpu' torch ")
    assert sampler.sample(1, progress=False).isfinite().all()
    assert sampler.report.engine == "eager"


def test_releases_that_were_tested_need_no_child(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("started a process"))
    monkeypatch.setattr(onednn, "TESTED", (torch.__version__,))
    assert onednn.problem() is None
    assert onednn._changed_schema() is None


@pytest.mark.parametrize("name", onednn._SCHEMAS)
def test_a_changed_operator_is_not_even_tried(name, monkeypatch, children):
    children("")
    monkeypatch.setitem(onednn._SCHEMAS, name, "(Tensor x) -> Tensor")
    words = rf"^torch \S+ has {name[0]}\.{name[1]} with other arguments: .*; install torch"
    with pytest.raises(RuntimeError, match=words):
        onednn.addresses()
    assert not children.started


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (signal 11)"),
        ("raise RuntimeError('its sum is off by 3')", "failed: RuntimeError: its sum is off by 3"),
        ("raise SystemExit(3)", "failed: it said nothing"),
    ],
)
def test_a_failed_trial_is_remembered(program, words, children, tmp_path):
    children(program)
    kind, _, reason = engines.pick("auto", "cpu")
    assert kind is EagerEngine
    assert f"in a child process {words}; install torch" in reason
    (file,) = (tmp_path / "ncsn_fast").glob("torch-*.json")
    assert words in json.loads(file.read_text())["failure"]
    onednn.problem.cache_clear()
    assert words in onednn.problem()
    assert len(children.started) == 1


def test_a_trial_that_was_stopped_is_tried_again(children, monkeypatch):
    children("import os; os.kill(os.getpid(), 9)")  # as a system does that is out of memory
    assert "in a child process crashed (signal 9)" in onednn.problem()
    monkeypatch.setattr(onednn, "_PATIENCE", 0.5)
    children("import time; time.sleep(60)")
    onednn.problem.cache_clear()
    assert "in a child process did not end: " in onednn.problem()
    monkeypatch.setattr(onednn, "_PATIENCE", 60.0)
    children("")
    onednn.problem.cache_clear()
    assert onednn.problem() is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"failure": 3}', "[" * 4000, "{}" + " " * 5000])
def test_a_damaged_verdict_is_found_anew(children, tmp_path, damage):
    children("")
    assert onednn.problem() is None
    (file,) = (tmp_path / "ncsn_fast").glob("torch-*.json")
    file.write_text(damage)
    onednn.problem.cache_clear()
    assert onednn.problem() is None
    assert len(children.started) == 2
    assert json.loads(file.read_text())["failure"] is None


def test_a_verdict_that_cannot_be_kept_costs_nothing(children, tmp_path):
    children("")
    (tmp_path / "ncsn_fast").write_text("a file where the folder should be")
    assert onednn.problem() is None


def test_the_trial_sees_a_wrong_sum(monkeypatch):
    onednn.trial()
    pack = onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda *a: [1.01 * t for t in pack(*a)])
    with pytest.raises(RuntimeError, match="its sum is off by "):
        onednn.trial()


@pytest.mark.parametrize("name", ["product", "products"])
def test_the_trial_sees_a_wrong_product(name, monkeypatch):
    right = getattr(onednn, name)
    monkeypatch.setattr(onednn, name, lambda plan, of, a, *more: right(plan, of, 1.01 * a, *more))
    with pytest.raises(RuntimeError, match="its sum is off by "):
        onednn.trial()


def called_by_plans() -> list[str]:
    """Functions of libtorch that the C++ sources call: members of `struct Torch`, in order."""
    header, calls = (ROOT / "csrc" / "cpu" / "plan.h").read_text(), set()
    (members,) = re.findall(r"^struct Torch \{\n(.*?)^\};", header, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^    (?!using)\w+ (\w+);$", members, re.MULTILINE)
    for source in (ROOT / "csrc").rglob("*.cpp"):
        calls |= {*re.findall(r"\btorch_?\.(\w+)\(", source.read_text())}
    assert calls == {*names}
    return names


def test_the_trial_calls_every_function_that_plans_call(monkeypatch):
    names, used = called_by_plans(), []
    assert len(names) == len(onednn._FUNCTIONS)
    real, word, number = onednn._found(), ctypes.c_void_p, ctypes.c_double
    arguments = {
        "convolution_add": [word] * 19, "product_add": [word] * 4 + [number] * 2,
        "products": [word] * 3, "release": [word],
    }  # fmt: skip

    def watched(name, address):
        kind = ctypes.CFUNCTYPE(ctypes.c_int32, *arguments[name])
        call = kind(address)
        return kind(lambda *given: used.append(name) or call(*given))

    held = [watched(*pair) for pair in zip(names, real, strict=True)]
    addresses = tuple(ctypes.cast(function, word).value for function in held)
    monkeypatch.setattr(onednn, "_found", lambda: addresses)
    onednn.trial()
    assert {*used} == {*names}


def test_schemas_are_known_of_every_function_of_an_operator():
    operators = {name.strip("_") for _, name, _ in onednn._SCHEMAS}
    for function in onednn._FUNCTIONS:
        known = any(operator in function for operator in operators)
        assert known == (function != "aoti_torch_delete_tensor_object"), function


def test_private_names_of_torch_are_in_one_module():
    private = re.compile(r"\bmkldnn\.|torch\.ops\.mkldnn|aoti_|_aoti")
    users = {p.name for p in (ROOT / "ncsn_fast").rglob("*.py") if private.search(p.read_text())}
    assert users == {"onednn.py"}


@pytest.mark.slow
def test_the_trial_runs_in_a_child_of_this_interpreter(monkeypatch):
    monkeypatch.setattr(onednn, "TESTED", UNTESTED)
    monkeypatch.setattr(sys, "path", [*sys.path, "/a folder with 'quotes'"])
    assert onednn.problem() is None
