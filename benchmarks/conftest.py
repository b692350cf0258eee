"""Fixture `race`, its options, and the machine facts in every benchmark's JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from race import Absent, Entrant, Pace, Replay, Result
from race import race as run_race

from ncsn_fast import EngineUnavailable, ops

RESULTS = pytest.StashKey[dict[tuple[Any, ...], dict[str, Result]]]()
NOT_RUN = pytest.StashKey[list[dict[str, str]]]()
# Environment variables that keep a run from instructions that the processor has.
LIMITS = ("NCSN_FAST_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a race.

    Attributes:
        names: the selected providers of the group.
        small: tiny networks, to test the benchmarks themselves.
        peak_memory: whether to measure peak memory too.
    """

    names: list[str]
    small: bool
    peak_memory: bool


Builders = Callable[[Settings], Mapping[str, Callable[[], Entrant]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("races")
    group.addoption(
        "--race-seconds", type=float, default=60.0,
        help="time for the rounds of each group of providers (default: %(default)s)",
    )  # fmt: skip
    group.addoption(
        "--race-rounds", type=int, default=5, help="fewest rounds (default: %(default)s)"
    )
    group.addoption("--small", action="store_true", help="tiny networks, two rounds: a test")
    group.addoption("--no-peak-memory", action="store_true", help="do not measure memory")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Gives each benchmark its own timer, which `race` fills with laps; see Replay."""
    if "race" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.benchmark(timer=Replay()))


def _group(item: Any) -> tuple[Any, ...]:
    """Returns the parameters that the benchmarks of one race share: all but the provider."""
    others = {k: v for k, v in item.callspec.params.items() if k != "provider"}
    return (item.path, item.originalname, *map(str, others.values()))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Returns race(builders, title, **pace), which races a whole group of providers.

    It reports the result of this test's provider.

    The first benchmark of a group builds, verifies and times all its providers; each benchmark then
    passes its own laps to pytest-benchmark. `builders` maps the settings to builders by name.
    """
    item: Any = request.node

    def report(builders: Builders, title: str, **pace: Any) -> None:
        races = request.session.stash.setdefault(RESULTS, {})
        key, benchmark.group = _group(item), title
        if key not in races:
            races[key] = run_race(
                builders(_settings(item, small=benchmark.disabled or request.config.option.small)),
                dataclasses.replace(_pace(request.config, benchmark.disabled), **pace),
            )
        provider = item.callspec.params["provider"]
        result = races[key][provider]
        if result.failure is not None:
            note = {"group": title, "provider": provider, "reason": str(result.failure)}
            request.config.stash.setdefault(NOT_RUN, []).append(note)
            if isinstance(result.failure, (Absent, EngineUnavailable)):
                pytest.skip(str(result.failure))
            raise result.failure
        benchmark.extra_info.update(
            provider=provider, group=title, threads=torch.get_num_threads(), **result.info
        )
        _hand_over(item, benchmark, result)

    return report


def _settings(item: Any, *, small: bool) -> Settings:
    names = [
        other.callspec.params["provider"]
        for other in item.session.items
        if "race" in getattr(other, "fixturenames", ()) and _group(other) == _group(item)
    ]
    return Settings(names, small, peak_memory=not item.config.option.no_peak_memory)


def _pace(config: pytest.Config, once: bool) -> Pace:
    if once:
        return Pace(seconds=0, fewest=1, most=1, lead_in=0)
    if config.option.small:
        return Pace(seconds=0, fewest=2, most=2)
    return Pace(seconds=config.option.race_seconds, fewest=config.option.race_rounds)


def _hand_over(item: Any, benchmark: Any, result: Result) -> None:
    """Runs pytest-benchmark on an empty function with a timer that replays the recorded laps."""
    clock = item.get_closest_marker("benchmark").kwargs["timer"]
    clock.laps = result.laps
    benchmark.pedantic(lambda: None, rounds=len(result.laps), iterations=result.iterations)


def pytest_benchmark_update_json(config: Any, output_json: dict[str, Any]) -> None:
    """Adds the providers that were not timed, with the reason, so that none is missing silently."""
    output_json["not_run"] = config.stash.get(NOT_RUN, [])


def _processor() -> tuple[str, list[str]]:
    """Returns the processor's model name and its instruction sets that affect speed here."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", "").split()
    return facts.get("model name", platform.processor()), [f for f in FLAGS if f in flags]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """Returns the facts that decide speed: processor, threads, instruction set, versions."""
    processor, flags = _processor()
    return {
        "processor": processor,
        "flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": ops.available()["isa_default"],
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {
            name: _version(name) for name in ("torch", "openvino", "onnxruntime", "ncsn_fast")
        },
    }


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Adds `machine_facts` to the JSON."""
    machine_info["ncsn_fast"] = machine_facts()
