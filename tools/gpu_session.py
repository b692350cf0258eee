"""Builds, tests and measures on an NVIDIA GPU in one go, within minutes: `make gpu`.

A GPU is often available for minutes only, so this never stops at the first failure. Every step is a
process with a deadline; if it fails, or runs out of time, the reason is recorded and the next step
runs. It needs a Python with torch, but no network, and none of the packages that only the commands
or the CPU benchmarks import. Steps that do not compete for the GPU run in parallel; the benchmarks
run alone, by importance.

`--rehearse` runs the whole plan on a CPU: tiny sizes, interpreted Triton, no meaningful results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import write_gpu_results
from deadlines import ABSENT, FAILED, LATE, OK, Outcome, Runner, last_line
from gpu_plan import ROOT, SANITIZER, SECTIONS, Session, search_path

PARTS = ("test", "bench")
PROBE = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
found = {"name": None, "torch": torch.__version__, "cuda_home": CUDA_HOME}
if torch.cuda.is_available():
    found["name"] = torch.cuda.get_device_name()
    found["architecture"] = "%d%d" % torch.cuda.get_device_capability()
print(json.dumps(found))
"""


def collect(session: Session) -> list[dict[str, Any]]:
    """Returns the records of all sections; missing parts are included with the reason."""
    outcomes = {outcome.name: outcome for outcome in session.runner.outcomes}
    records = []
    for name in SECTIONS:
        path = session.records / f"{name}.json"
        outcome = outcomes.get(f"benchmark {name}", Outcome(name, ABSENT, "not reached"))
        record = {"section": name, "groups": [], "not_run": [], "pending": []}
        if path.exists():
            record = json.loads(path.read_text())
        reason = f"the section: {outcome.status}, {outcome.reason or 'it ended early'}"
        pending = record.pop("pending")
        if not path.exists():
            pending = [{"group": name, "provider": "all"}]
        record["not_run"] += [{**row, "reason": reason, "failed": False} for row in pending]
        records.append(record)
    return records


def results(session: Session) -> dict[str, Any]:
    """Returns everything that is kept of a session."""
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    sections = collect(session)
    machines = [record["machine"] for record in sections if "machine" in record]
    return {
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.strip() or None,
        "rehearsal": session.rehearse,
        "machine": machines[0] if machines else {"gpu": session.gpu["name"]},
        "steps": [vars(outcome) for outcome in session.runner.outcomes],
        "sections": sections,
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Returns whether a session failed.

    Benchmarks and tools may run out of time; other steps may not, and none may fail.
    """
    may_be_late = ("benchmark", SANITIZER)
    return any(
        o.status == FAILED or (o.status == LATE and not o.name.startswith(may_be_late))
        for o in outcomes
    )


def probe(rehearse: bool) -> dict[str, Any]:
    """Returns the GPU of this machine; SystemExit if there is none."""
    if rehearse:
        return {"name": "rehearsal"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{sys.executable} has no working torch: {last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(last_line(done.stdout))
    if found["name"] is None:
        raise SystemExit(
            f"torch {found['torch']} of {sys.executable} sees no NVIDIA GPU; `make gpu PY=python3` "
            "takes the system's Python, `make rehearse-gpu` runs the plan on a CPU"
        )
    return found


def main() -> int:
    """Runs the session; exit code 1 if a step failed, although all others still run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; both if none is given")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="folder for results and log")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; got {' '.join(parts)}")
    ends = time.monotonic() + arguments.deadline
    gpu = probe(arguments.rehearse)
    usual = "build/gpu-rehearsal" if arguments.rehearse else "benchmarks/results"
    out = (arguments.out or ROOT / usual).resolve()
    out.mkdir(parents=True, exist_ok=True)
    base = out / f"gpu-{slug(gpu['name'].removeprefix('NVIDIA '))}"
    environment = {
        **os.environ, "PATH": search_path(gpu), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    } | ({"TRITON_INTERPRET": "1"} if arguments.rehearse else {})  # fmt: skip
    runner = Runner(ends, base.with_suffix(".log"), ROOT, environment)
    for interruption in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interruption, lambda *_: runner.stop())
    with tempfile.TemporaryDirectory() as records:
        session = Session(runner, gpu, Path(records), arguments.rehearse)
        try:
            session.run(parts)
        except Exception as error:  # the measurements so far are still written
            reason = f"{type(error).__name__}: {error}"
            runner.note(Outcome("session", FAILED, reason), traceback.format_exc())
        finally:
            session.close()
        if "bench" in parts:
            found = base.with_suffix(".json")
            found.write_text(json.dumps(results(session), indent=1) + "\n")
            print(write_gpu_results.write(found))
    print(f"{sum(o.status == OK for o in runner.outcomes)} of {len(runner.outcomes)} steps went "
          f"well; the rest is above, all output in {base.with_suffix('.log')}")  # fmt: skip
    return int(failed(runner.outcomes))


if __name__ == "__main__":
    sys.exit(main())
