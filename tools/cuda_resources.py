"""Reports registers, spills, shared memory and widths of global accesses of the CUDA kernels.

    python tools/cuda_resources.py            compiles for sm_80 and sm_90 and writes the report
    python tools/cuda_resources.py --check    compiles, and fails where the report says otherwise

Needs nvcc and c++filt, no GPU. Flags are those of cmake/cuda.cmake.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "benchmarks" / "results" / "cuda-resources.json"
SOURCES = ("instance_norm_plus", "group_norm", "sampler_update")
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ("-Icsrc/include", "-O3", "-DNDEBUG", "-std=c++20", "--fmad=false")

Kernel = dict[str, Any]


def output(*command: str, text: str | None = None) -> str:
    result = subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def short_names(mangled: list[str]) -> dict[str, str]:
    """Maps mangled names to the kernel's struct, as in `Apply<float 4, float 4>`."""
    plain = output("c++filt", text="\n".join(mangled)).splitlines()
    names = {}
    for symbol, full in zip(mangled, plain, strict=True):
        found = re.search(r"phases_kernel<(.*)>\(", full.replace("ncsn_fast::", ""))
        if found is None:
            raise SystemExit(f"unexpected kernel {full}")
        name = re.sub(r"Access<(\w+), (\d)>", r"\1 \2", found[1])
        names[symbol] = re.sub(r"\s+>", ">", name).strip()
    return names


def resources(log: str) -> dict[str, Kernel]:
    """Parses the ptxas log into resources by mangled name."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    kernels = {}
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[name] = {
            "registers": int(registers),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return kernels


def accesses(ptx: str) -> dict[str, dict[str, dict[str, int]]]:
    """Counts global loads and stores by mangled name and bytes per access."""
    kernels = {}
    for name, body in re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE):
        widths = {}
        for key, kind in (("load_bytes", "ld"), ("store_bytes", "st")):
            found: Counter[str] = Counter()
            pattern = rf"{kind}\.global(?:\.[a-z_]+)*(?:\.v(\d))?\.[busf](\d+)"
            for vector, bits in re.findall(pattern, body):
                found[str(int(vector or 1) * int(bits) // 8)] += 1
            widths[key] = dict(sorted(found.items()))
        kernels[name] = widths
    return kernels


def compiled(source: str, architecture: str, folder: Path) -> list[Kernel]:
    """Compiles one file for one architecture and returns its kernels by name."""
    command = ("nvcc", *FLAGS, f"csrc/cuda/{source}.cu", f"-arch={architecture}")
    log = output(*command, "-cubin", "-Xptxas=-v", "-o", str(folder / "cubin"))
    output(*command, "-ptx", "-o", str(folder / "ptx"))
    widths = accesses((folder / "ptx").read_text())
    found = resources(log)
    if not found or set(found) != set(widths):
        raise SystemExit(
            f"ptxas and PTX name different kernels of {source}: its output has changed"
        )
    names = short_names(list(found))
    kernels = [
        {
            "kernel": names[name],
            "source": source,
            "arch": architecture,
            **found[name],
            **widths[name],
        }
        for name in found
    ]
    return sorted(kernels, key=lambda kernel: kernel["kernel"])


def report(architectures: tuple[str, ...] = ARCHITECTURES) -> dict[str, Any]:
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            found: dict[str, Kernel] = {}
            for source in SOURCES:  # norms share their statistics
                for kernel in compiled(source, architecture, Path(folder)):
                    found.setdefault(kernel["kernel"], kernel)
            kernels += found.values()
    version = re.search(r"release [\d.]+, V([\d.]+)", output("nvcc", "--version"))
    return {"nvcc": version[1] if version else "", "flags": list(FLAGS), "kernels": kernels}


def differences(found: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Returns the differences from the committed report, for the compiled architectures."""
    architectures = {kernel["arch"] for kernel in found["kernels"]}

    def by_name(kernels: list[Kernel]) -> dict[str, Kernel]:
        return {f"{k['arch']} {k['kernel']}": k for k in kernels if k["arch"] in architectures}

    new, old = by_name(found["kernels"]), by_name(committed["kernels"])
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(new | old)
        if new.get(name) != old.get(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed report")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    if not options.check and tuple(options.arch) != ARCHITECTURES and options.out == REPORT:
        raise SystemExit("the committed report has every architecture: give --out or no --arch")
    missing = [tool for tool in ("nvcc", "c++filt") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not found on PATH")
    found = report(tuple(options.arch))
    if options.check:
        committed = json.loads(REPORT.read_text())
        if found["nvcc"] != committed["nvcc"]:
            sys.exit(f"the report is of nvcc {committed['nvcc']}; this is {found['nvcc']}")
        lines = differences(found, committed)
        sys.exit("\n".join([*lines, "run tools/cuda_resources.py"]) if lines else 0)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    worst = max(found["kernels"], key=lambda kernel: kernel["registers"])
    print(f"{len(found['kernels'])} kernels, at most {worst['registers']} registers a thread")


if __name__ == "__main__":
    main()
