"""Autotuning of the CPU engine: times its alternatives once per machine and caches the result.

Timed are the dtype of feature maps, and of every layer that has two algorithms (layers.py) both:
for a 3x3 convolution oneDNN's direct one and our Winograd convolution
(csrc/include/ncsn_fast/winograd.h), for a 1x1 convolution oneDNN's and a matrix product, for
attention our fused kernel and matrix products. With AMX every convolution of bfloat16 maps that
keeps their size is timed in its tiles, too (csrc/include/ncsn_fast/tile_conv.h). Which is faster
depends on the processor: oneDNN's bfloat16 needs AMX or AVX-512-BF16 to be fast, and without
AVX-512 its convolutions of bfloat16 maps are of copies in float32; Winograd needs a quarter of the
multiplications and multiplies bfloat16 maps in 16-bit fixed point, which every processor supports.
No choice depends on the batch size, so that all processes of a job choose alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import cast

import filelock
import torch

from ncsn_fast.data import files
from ncsn_fast.data.json_file import find_json
from ncsn_fast.engines.base import DTYPES
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.cpu.layers import AnyLayer, TileLayer
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph
from ncsn_fast.engines.torch_settings import torch_threads
from ncsn_fast.notices import notice
from ncsn_fast.ops import tiles
from ncsn_fast.ops.extension import _C, forced_isa

log = logging.getLogger(__name__)
ALGORITHMS = ("direct", "winograd", "amx")
GAIN = 1.1  # required speedup over the default, above the noise of the timer
_ROUNDS = 7
_PATIENCE = 60.0  # seconds to wait for another process that measures
_LARGEST = 1e4  # speed in a file; others are damaged
# Environment variables that limit the instruction sets of oneDNN and torch.
_LIMITS = (*onednn.LIMITS, "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY")

_known: dict[Path, Choice] = {}  # by the file that remembers it
_layers: dict[Path, dict[str, float]] = {}  # gains of second algorithms, likewise
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Choice:
    """Speeds of a typical convolution in each variant, relative to direct fp32.

    A variant is a dtype and an algorithm, such as "bf16 winograd".
    """

    speed: dict[str, float]

    def algorithm(self, dtype: str) -> str:
        """Returns the fastest algorithm for 3x3 convolutions in this dtype."""
        speeds = {name: self.speed.get(f"{dtype} {name}", 0.0) for name in ALGORITHMS}
        best = max(speeds, key=speeds.__getitem__)
        return best if speeds[best] / speeds["direct"] >= GAIN else "direct"

    @property
    def dtype(self) -> str:
        """The faster dtype, each with its better algorithm."""
        fp32, bf16 = (self.speed[f"{dtype} {self.algorithm(dtype)}"] for dtype in ("fp32", "bf16"))
        return "bf16" if bf16 / fp32 >= GAIN else "fp32"

    def __str__(self) -> str:
        speeds = ", ".join(f"{name} {speed:.2g}x" for name, speed in self.speed.items())
        return f"{self.dtype}, 3x3 convolutions {self.algorithm(self.dtype)} (measured: {speeds})"


def fastest(threads: int | None = None, *, measure: bool = False) -> Choice:
    """Returns the choice for this machine: remembered, or timed now in about a second.

    Of several processes that ask at once, one measures and the others wait for its result.

    Args:
        threads: CPU threads of the engine; None for torch's setting.
        measure: whether to measure again and replace what is remembered.
    """
    threads = threads or torch.get_num_threads()
    path = files.cache_folder() / f"cpu-{_key(threads)}.json"
    with _lock:
        if measure or path not in _known:
            _known[path] = _obtain(path, threads, measure)
        return _known[path]


def gains(
    layers: Collection[AnyLayer], dtype: str, threads: int | None = None
) -> dict[AnyLayer, float]:
    """Returns of each layer the speed of its second algorithm relative to the first.

    Remembered, or timed now. Of several processes that ask at once, one measures and the others
    wait for its result.
    """
    threads = threads or torch.get_num_threads()
    path = files.cache_folder() / f"convolutions-{_key(threads)}.json"
    names = {layer: f"{dtype} {layer.kind}{_numbers(layer)}" for layer in layers}
    with _lock:
        known = _layers.setdefault(path, {})
        if not {*names.values()} <= known.keys():
            known |= _obtain_layers(path, names, dtype, threads)
        return {layer: known[name] for layer, name in names.items()}


def _numbers(layer: AnyLayer) -> str:
    return " ".join(map(str, dataclasses.astuple(layer)))


def _obtain_layers(
    path: Path, names: Mapping[AnyLayer, str], dtype: str, threads: int
) -> dict[str, float]:
    """Reads the speeds of layers; measures those that are missing, and adds them to the file."""

    def missing() -> list[AnyLayer]:
        return [layer for layer, name in names.items() if name not in known]

    known = _read_layers(path)
    if not missing():
        return known
    with _only_process(path):
        known = _read_layers(path)
        for layer in missing():
            known[names[layer]] = _measure_layer(layer, dtype, threads)
        _write(path, known)
    return known


def _measure_layer(layer: AnyLayer, dtype: str, threads: int) -> float:
    """Returns the speed of the second algorithm relative to the first."""
    graph = layer.graph()
    with torch.inference_mode(), torch_threads(threads):
        first, second = (
            CpuPlan(
                graph, layer.batch, DTYPES[dtype], winograd=other, products=other,
                tiles=other and isinstance(layer, TileLayer),
            )
            for other in (False, True)
        )  # fmt: skip
        seconds = _seconds({"first": first, "second": second})
    return seconds["first"] / seconds["second"]


def _read_layers(path: Path) -> dict[str, float]:
    """Returns the speeds in a file; without those that are damaged."""
    known = find_json(path) or {}
    return {name: float(speed) for name, speed in known.items() if _is_speed(speed)}


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Waits until no other process measures for a file; goes on without, where that fails."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path.with_suffix(".lock"), timeout=_PATIENCE)
            held.enter_context(lock)
        except (OSError, NotImplementedError) as error:  # Timeout is an OSError
            notice(log, "%s; this process measures the processor by itself", error)
        yield


def _write(path: Path, speeds: Mapping[str, float]) -> None:
    try:
        with files.atomic_write(path) as temporary:
            temporary.write_text(json.dumps(speeds))
    except OSError as error:
        notice(log, "%s; the processor is measured again next time", error)


def _is_speed(speed: object) -> bool:
    return type(speed) in (int, float) and 1 / _LARGEST < cast(float, speed) < _LARGEST


def _obtain(path: Path, threads: int, measure: bool) -> Choice:
    """Reads the file of a choice; measures and writes it if it is missing, or with `measure`."""
    if (found := None if measure else _read(path)) is not None:
        return found
    with _only_process(path):
        if (found := None if measure else _read(path)) is not None:
            return found
        choice = Choice(_measure(threads))
        _write(path, choice.speed)
    return choice


def _read(path: Path) -> Choice | None:
    """Returns the choice in a file; None if there is none, or something else."""
    known = find_json(path)
    names = [f"{dtype} {algorithm}" for dtype, algorithm in _variants()]
    if known is None or set(known) != set(names):
        return None
    if not all(map(_is_speed, known.values())):
        return None
    return Choice({name: float(known[name]) for name in names})


def _variants() -> list[tuple[str, str]]:
    """Returns the dtypes, fp32 first, each with its algorithms."""
    found = [
        (dtype, algorithm) for dtype in ("fp32", "bf16") for algorithm in ("direct", "winograd")
    ]
    return found + [("bf16", "amx")] * (tiles.level() is not None)


def _measure(threads: int) -> dict[str, float]:
    """Returns speeds relative to the first variant."""
    with torch.inference_mode(), torch_threads(threads):
        seconds = _seconds({f"{d} {a}": _convolution(DTYPES[d], a) for d, a in _variants()})
    first = next(iter(seconds.values()))
    return {name: first / each for name, each in seconds.items()}


def _seconds(plans: Mapping[str, CpuPlan]) -> dict[str, float]:
    """Returns the seconds that plans take: the least of interleaved rounds.

    What other processes do meanwhile only adds to a round, and may do so to most of one plan's.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(_ROUNDS + 1):
        for name, plan in plans.items():
            began = time.perf_counter()
            plan.run()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    return {name: min(times) for name, times in seconds.items()}


def _convolution(dtype: torch.dtype, algorithm: str) -> CpuPlan:
    graph = Graph(128, 16, 16)
    weight = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    graph.output = graph.conv("conv", graph.input, ConvolutionSpec(weight))
    return CpuPlan(graph, 4, dtype, winograd=algorithm == "winograd", tiles=algorithm == "amx")


def _key(threads: int) -> str:
    """Returns a hash of what decides the choice: processor, versions, threads and limits."""
    limits = [f"{name}={os.environ.get(name, '')}" for name in _LIMITS]
    versions = [_C.build_info()["version"], torch.__version__]
    facts = [*_processor(), *versions, *limits, f"isa={forced_isa.get()}", f"threads={threads}"]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


@functools.cache
def _processor() -> tuple[str, ...]:
    """Returns the model names and flags of the processors."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    known = ("model name", "flags", "Features")
    return tuple(sorted({line for line in lines if line.startswith(known) or not cpu.exists()}))
