"""The GPU session, rehearsed on the CPU: every step of the plan leaves an outcome and a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import triton_common
from paths import ROOT, SUPPORT

sys.path += [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import deadlines
import gpu_plan
import gpu_session
import write_gpu_results

STATUSES = {deadlines.OK, deadlines.ABSENT}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON of a rehearsal, and the folder it is in."""
    out = tmp_path_factory.mktemp("session")
    command = [sys.executable, str(ROOT / "tools" / "gpu_session.py"), "--rehearse"]
    done = subprocess.run(
        [*command, "--out", str(out), "--deadline", "300"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu-rehearsal.json").read_text()), out


@pytest.mark.slow
@triton_common.needs_triton
def test_every_step_was_executed_or_has_a_reason(session: tuple[dict[str, Any], Path]) -> None:
    steps = {step["name"]: step for step in session[0]["steps"]}
    assert {step["status"] for step in steps.values()} <= STATUSES
    assert all(step["reason"] for step in steps.values() if step["status"] == deadlines.ABSENT)
    for name in gpu_plan.SECTIONS:
        assert steps[f"benchmark {name}"]["status"] == deadlines.OK
    assert steps["fuzz 1 of 1, memcheck (plain)"]["status"] == deadlines.OK
    files = list((ROOT / "tests").rglob("test_*_gpu.py"))
    assert "test_triton_gpu.py" in {path.name for path in files}
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(steps)


@pytest.mark.slow
@triton_common.needs_triton
def test_every_provider_has_a_time_or_a_reason(session: tuple[dict[str, Any], Path]) -> None:
    sections = session[0]["sections"]
    assert [s["section"] for s in sections] == list(gpu_plan.SECTIONS)
    assert not any(row["failed"] for s in sections for row in s["not_run"])
    for section in sections:
        for group in section["groups"]:
            assert all(r["median"] > 0 and r["rounds"] >= 2 for r in group["results"].values())
    found = {g["group"] for s in sections for g in s["groups"]}
    step = "one sampling step, {}B = {}".format
    unet = step("DDPM U-Net of diffusers, ", 16)
    assert {"device copy", "bf16 matrix product", step("", 256), unet} <= found
    absent = {row["provider"]: row["reason"] for s in sections for row in s["not_run"]}
    assert absent["inductor-bf16"] == "a rehearsal compiles nothing"
    assert "graph='on' is for CUDA graphs" in absent["ort-fp16-graph"]
    assert "engine 'trt'" in absent["trt-fp16"]
    timed = {name for s in sections for g in s["groups"] for name in g["results"]}
    assert "ort-fp16" in timed


@pytest.mark.slow
@triton_common.needs_triton
def test_the_page_holds_every_table(session: tuple[dict[str, Any], Path]) -> None:
    page = (session[1] / "gpu-rehearsal.md").read_text()
    for text in ("no number here means anything", "| step, B = 256 | published, float32 | 6x |",
                 "| `eager-bf16` |", "| one sampling step, B = 1 |", "Faster family",
                 "| 4 |", "## Not run", "a rehearsal compiles nothing"):  # fmt: skip
        assert text in page, text


def test_the_sections_are_those_that_can_be_measured() -> None:
    import measure_gpu

    assert list(gpu_plan.SECTIONS) == list(measure_gpu.SECTIONS)


def runner(tmp_path: Path, seconds: float = 30.0) -> deadlines.Runner:
    ends = time.monotonic() + seconds
    return deadlines.Runner(ends, tmp_path / "log", tmp_path, dict(os.environ))


def step(name: str, code: str, seconds: float = 20.0) -> deadlines.Step:
    return deadlines.Step(name, lambda _: [sys.executable, "-c", code], seconds)


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    run = runner(tmp_path)

    def broken(_: float) -> list[str]:
        raise ValueError("no such tool")

    steps = [
        step("fails", "print('the reason'); raise SystemExit(3)"),
        step("hangs", "import time; time.sleep(60)", seconds=3.5),
        deadlines.Step("has no command", broken, 20.0),
        deadlines.Step("absent", lambda _: "not here", 20.0),
        step("works", "print('done')"),
    ]
    run.stage(steps, workers=2)
    found = {o.name: (o.status, o.reason) for o in run.outcomes}
    assert found == {
        "fails": (deadlines.FAILED, "the reason"),
        "hangs": (deadlines.LATE, "stopped after 4 s"),
        "has no command": (deadlines.FAILED, "ValueError: no such tool"),
        "absent": (deadlines.ABSENT, "not here"),
        "works": (deadlines.OK, ""),
    }
    assert gpu_session.failed(run.outcomes)
    assert "done" in (tmp_path / "log").read_text()


def test_children_of_a_step_end_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {!r}])"
    late = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    run = runner(tmp_path)
    run.stage([step("leaves a child", child.format(late))], workers=1)
    time.sleep(3)
    assert run.outcomes[0].status == deadlines.OK
    assert not (tmp_path / "late").exists()


def test_later_stages_keep_their_time(tmp_path: Path) -> None:
    run = runner(tmp_path, seconds=20.0)
    run.stage([step("early", "pass")], workers=1, reserve=19.0)
    run.stage([step("later", "pass")], workers=1)
    assert [o.status for o in run.outcomes] == [deadlines.LATE, deadlines.OK]
    assert run.outcomes[0].reason == "not started: no time was left"


def test_what_a_stopped_section_had_before_it_is_listed(tmp_path: Path) -> None:
    run = runner(tmp_path)
    for name in gpu_plan.SECTIONS:
        run.note(deadlines.Outcome(f"benchmark {name}", deadlines.LATE, "stopped after 9 s", 9.0))
    record = {"section": "norms", "groups": [], "not_run": [],
              "pending": [{"group": "g", "provider": "p"}]}  # fmt: skip
    (tmp_path / "norms.json").write_text(json.dumps(record))
    found = gpu_session.collect(gpu_plan.Session(run, {}, tmp_path, rehearse=True))
    norms, updates = (next(s for s in found if s["section"] == n) for n in ("norms", "updates"))
    reason = "the section: out of time, stopped after 9 s"
    assert norms["not_run"] == [{"group": "g", "provider": "p", "reason": reason, "failed": False}]
    assert updates["not_run"][0] == {
        "group": "updates", "provider": "all", "reason": reason, "failed": False
    }  # fmt: skip
    assert not gpu_session.failed(run.outcomes)


OUTCOMES: list[tuple[Any, int, str, tuple[str, str]]] = [
    (gpu_plan.pytest_outcome, 0, "3 passed in 2s", ("ok", "3 passed in 2s")),
    (gpu_plan.pytest_outcome, 0, "SKIPPED [1] a:1: no GPU\n1 skipped", ("not run", "no GPU")),
    (gpu_plan.pytest_outcome, 5, "no tests ran", ("not run", "no tests ran")),
    (gpu_plan.pytest_outcome, 1, "FAILED a::t - x\n1 failed", ("failed", "FAILED a::t - x")),
    (gpu_plan.fuzz_outcome, 0, "8 of 8 cases passed (9 asked for); a",
     ("ok", "8 of 8 cases passed (9 asked for)")),
    (gpu_plan.fuzz_outcome, 9, "8 of 8 cases passed (8 asked for)\n= ERROR SUMMARY: 1 error",
     ("failed", "ERROR SUMMARY: 1 error")),
    (gpu_plan.fuzz_outcome, 1, "FAILED y: wrong\n7 of 8 cases", ("failed", "FAILED y: wrong")),
    (gpu_plan.tool_outcome, 1, "= Error: no such device", ("not run", "= Error: no such device")),
    (gpu_plan.build_outcome, 1, "x\na.cu(3): error: no\nend", ("failed", "a.cu(3): error: no")),
]  # fmt: skip


@pytest.mark.parametrize(("judge", "code", "output", "expected"), OUTCOMES)
def test_outcomes(judge: Any, code: int, output: str, expected: tuple[str, str]) -> None:
    assert judge(code, output) == expected


def synthetic() -> dict[str, Any]:
    """A session of round numbers: one second moves 1 TB and multiplies 1 PFLOP."""

    def group(title: str, facts: dict[str, Any], **times: float) -> dict[str, Any]:
        results = {n.replace("_", "-"): {"median": t} for n, t in times.items()}
        return {"group": title, "facts": facts, "results": results}

    step_facts = {"flop": 6e14, "batch": 256, "nfe": 1161}
    norm = {"bytes": 9e11, "batch": 256, "cache": "cold"}
    groups = [
        group("device copy", {"bytes": 1e12}, copy=1.0),
        group("bf16 matrix product", {"flop": 1e15}, matmul=1.0),
        group("one sampling step, B = 256", step_facts, published_fp32=7.0, ours_triton_level=1.0,
              ours_cuda_level=1.25),
        group("IN++ with ELU, 1x2x3, B = 256, cold", norm, triton_auto=1.0, cuda_split=2.0),
    ]  # fmt: skip
    return {
        "datetime": "2026-01-02T03:04:05Z", "commit": "0123456789", "rehearsal": False,
        "machine": {"gpu": "Some GPU"}, "steps": [],
        "sections": [{"section": "s", "groups": groups, "not_run": []}],
    }  # fmt: skip


def test_required_and_measured() -> None:
    page = write_gpu_results.render(synthetic(), "x.json")
    for line in (
        "| IN++ with ELU, 1x2x3, B = 256, cold | device copy | 85% | 90%, met, triton-auto |",
        "| sampler update | device copy | 90% | not measured |",
        "| step, B = 256 | published, float32 | 6x | 7.00x, met, ours-triton-level |",
        "| step, B = 256 | torch.compile max-autotune, bf16 | 1.2x | not measured |",
        "| step, B = 256 | bf16 matrix product | 55% | 60%, met |",
    ):
        assert line in page, line
    assert "IN++ with ELU: Triton is 2.00 times as fast as CUDA C++" in page
    assert "sampling step: Triton is 1.25 times as fast as CUDA C++" in page
    assert "sampler update: not comparable" in page


@pytest.mark.slow
def test_nothing_needs_what_a_gpu_machine_may_lack(tmp_path: Path) -> None:
    """Python with torch, Triton and pytest is enough to collect, fuzz and measure."""
    absent = ("tyro", "datasets", "openvino", "matplotlib", "tensorboard", "onnx", "onnxscript")
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*_gpu.py"))
    program = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
sys.path[:0] = [{str(SUPPORT)!r}, {str(ROOT / "benchmarks")!r}]
import gpu_fuzz, measure_gpu, pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *{files!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests collected" in done.stdout
