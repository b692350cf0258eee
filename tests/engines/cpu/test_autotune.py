"""How the cpu engine chooses type and algorithm: timed once, remembered, and forced."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, TYPES, model

from ncsn_fast import _C, Sampler, doctor, ops
from ncsn_fast.engines.base import DTYPES
from ncsn_fast.engines.cpu import autotune, onednn
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cpu.layers import Attention, Layer, Pointwise
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.precision import BOUNDS


def engine(of):
    return CpuEngine(of, device=CPU, dtype="fp32", batch_size=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    onednn.lacks(torch.float32)  # oneDNN reads its limits when it is first used
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ncsn_fast"


SPEED = {"fp32 direct": 1.0, "fp32 winograd": 2.0, "bf16 direct": 1.9, "bf16 winograd": 4.0}
HERE = {variant: speed for variant, speed in SPEED.items() if variant.split()[0] in TYPES}


@pytest.fixture
def measured(cache, monkeypatch):
    """Replaces measuring by HERE; lists the numbers of threads that were measured."""
    threads: list[int] = []
    monkeypatch.setattr(autotune, "_measure", lambda n: threads.append(n) or HERE)
    return threads


def forget():
    """What a new process does not know."""
    autotune._known.clear()
    autotune._layers.clear()


def test_the_choice_is_measured_once_and_remembered(cache, monkeypatch):
    choice = autotune.fastest()
    assert list(choice.speed) == list(HERE)
    assert all(speed > 0 for speed in choice.speed.values())
    (file,) = cache.glob("cpu-*.json")
    assert json.loads(file.read_text()) == choice.speed
    monkeypatch.setattr(autotune, "_measure", lambda threads: pytest.fail("measured again"))
    forget()
    assert autotune.fastest() == choice
    assert CpuEngine.default_dtype(CPU) == choice.dtype


def test_it_is_remembered_for_what_decides_it(cache, measured, monkeypatch):
    def files():
        autotune.fastest(3)
        return {path.name for path in cache.glob("cpu-*.json")}

    (first,) = files()
    level = next(name for name in _C.isa_levels() if name != ops.available()["isa_default"])
    other = "default" if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" else "avx2"
    changes = [
        lambda: monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI"),
        lambda: monkeypatch.setenv("ATEN_CPU_CAPABILITY", other),
        lambda: monkeypatch.setattr(torch, "__version__", "2.99"),
        lambda: monkeypatch.setattr(autotune._C, "build_info", lambda: {"version": "9.9"}),
        lambda: monkeypatch.setattr(autotune, "_processor", lambda: ("model name: another",)),
    ]
    known = {first}
    for change in changes:
        change()
        assert len(files() - known) == 1
        known |= files()
    with ops.isa(level):
        assert len(files() - known) == 1
    assert measured == [3] * 7
    autotune.fastest(2)
    Sampler(model(), engine="cpu", threads=5)
    assert measured[7:] == [2, 5]


DAMAGED = {
    "cut": b"{",
    "a list": b"[]",
    "too few": b'{"fp32 direct": 1}',
    "nested": b"[" * 4000,
    "nested more": b"[" * 1_000_000,
    "zero": json.dumps(dict.fromkeys(HERE, 0)).encode(),
    "negative": json.dumps(dict.fromkeys(HERE, -1.0)).encode(),
    "tiny": json.dumps(dict.fromkeys(HERE, 1e-300)).encode(),
    "huge": json.dumps(dict.fromkeys(HERE, 10**400)).encode(),
    "infinite": json.dumps(dict.fromkeys(HERE, math.inf)).encode(),
    "no number": json.dumps(dict.fromkeys(HERE, math.nan)).encode(),
    "text": json.dumps(dict.fromkeys(HERE, "1")).encode(),
    "truth": json.dumps(dict.fromkeys(HERE, True)).encode(),
    "nothing": json.dumps(dict.fromkeys(HERE)).encode(),
    "lists": json.dumps({variant: [1] for variant in HERE}).encode(),
    "too many": json.dumps({**HERE, "fp64 direct": 1.0}).encode(),
    "not text": bytes(range(256)),
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_memory_is_measured_anew(cache, measured, damage):
    autotune.fastest()
    (file,) = cache.glob("cpu-*.json")
    file.write_bytes(DAMAGED[damage])
    forget()
    assert autotune.fastest() == autotune.Choice(HERE)
    assert json.loads(file.read_text()) == HERE
    assert len(measured) == 2


def test_it_can_be_measured_again(cache, measured, monkeypatch, capsys):
    autotune.fastest()
    assert doctor.main([]) == 0
    assert len(measured) == 1
    faster = {variant: 1.0 for variant in HERE}
    monkeypatch.setattr(autotune, "_measure", lambda threads: faster)
    assert doctor.main(["--measure"]) == 0
    threads = torch.get_num_threads()
    said = f"engine 'cpu' on {threads} threads computes in fp32, 3x3 convolutions direct (measured"
    assert said in capsys.readouterr().out
    forget()
    assert autotune.fastest() == autotune.Choice(faster)


def test_a_measurement_that_another_process_makes_is_waited_for(cache, measured):
    autotune.fastest()
    (file,) = cache.glob("cpu-*.json")
    kept = file.read_text()
    file.unlink()
    forget()
    with ThreadPoolExecutor() as pool, filelock.FileLock(file.with_suffix(".lock")):
        asked = pool.submit(autotune.fastest)
        time.sleep(0.2)
        assert not asked.done()
        file.write_text(kept)
    assert asked.result() == autotune.Choice(HERE)
    assert len(measured) == 1


@pytest.mark.slow
def test_of_many_processes_one_measures(cache):
    program = """
from ncsn_fast.engines.cpu import autotune
real = autotune._measure
def measure(threads):
    print("measured")
    return real(threads)
autotune._measure = measure
print(autotune.fastest().speed)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate()[0].splitlines() for process in started]
    assert sum(lines[0] == "measured" for lines in said) == 1
    assert len({lines[-1] for lines in said}) == 1


@pytest.mark.parametrize(
    ("changes", "dtype", "algorithms"),
    [
        ({}, "bf16", ("winograd", "winograd")),
        ({"bf16 direct": 4.0}, "bf16", ("winograd", "direct")),
        ({"bf16 direct": 0.1, "bf16 winograd": 0.2}, "fp32", ("winograd", "winograd")),
        (
            {"fp32 winograd": 1.05, "bf16 winograd": 1.05, "bf16 direct": 1.0},
            "fp32",
            ("direct",) * 2,
        ),
    ],
)
def test_the_fastest_way_is_chosen(changes, dtype, algorithms):
    choice = autotune.Choice({**SPEED, **changes})
    assert choice.dtype == dtype
    assert (choice.algorithm("fp32"), choice.algorithm("bf16")) == algorithms
    assert str(choice).startswith(f"{dtype}, 3x3 convolutions ")


def test_convolutions_can_be_forced(monkeypatch):
    of = model(ngf=32)
    kinds = {}
    for name in ("direct", "winograd"):
        built = CpuEngine(of, device=CPU, dtype="fp32", batch_size=1, convolutions=name)
        monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", name)
        assert engine(of).convolutions == built.convolutions == name
        kinds[name] = {cost.kind for cost in built._plan((16, 16)).costs}
    assert "winograd" in kinds["winograd"]
    assert "winograd" not in kinds["direct"]
    monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", "fft")
    with pytest.raises(
        ValueError, match=r"must be one of 'direct', 'winograd', 'amx', or .*; got 'fft'"
    ):
        engine(of)


def gains(monkeypatch, speeds):
    """Replaces timing a layer; lists the layers that are timed."""
    timed = []

    def measure(layer, dtype, threads):
        timed.append(layer)
        return speeds(layer) if isinstance(layer, Layer) else 1.0

    monkeypatch.setattr(autotune, "_measure_layer", measure)
    return timed


def test_every_layer_has_its_own_algorithm(cache, monkeypatch):
    """Timed once for each shape, remembered, told by `choices`, and had again from there."""
    monkeypatch.delenv("NCSN_FAST_CONVOLUTIONS", raising=False)
    timed = gains(monkeypatch, lambda layer: 2.0 if layer.inputs == 64 else 1.0)
    of = model(ngf=32)
    built = engine(of)
    plan = built._plan((16, 16))
    shapes = {
        (c.kind, x.inputs[0].channels) for c, x in zip(plan.costs, plan.graph.ops, strict=True)
    }
    assert ("winograd", 64) in shapes
    assert ("conv", 32) in shapes
    assert not shapes & {("winograd", 32), ("winograd", 16)}
    assert len(timed) == len({*timed}) > 2
    assert built.convolutions.startswith("layers:")
    forget()
    again = engine(model(ngf=32))
    assert again.convolutions == built.convolutions
    assert len(timed) == len({*timed})
    x = torch.rand(2, 3, 16, 16)
    gains(monkeypatch, lambda layer: pytest.fail("measured"))
    same = CpuEngine(of, device=CPU, dtype="fp32", batch_size=2, **built.choices)
    assert same.choices == built.choices
    assert torch.equal(same.output(x, None), built.output(x, None))
    sampler = Sampler(of, engine="cpu", dtype="fp32", batch_size=2, **built.choices)
    assert sampler.engine_for(2).choices == built.choices
    with pytest.raises(ValueError, match=r"hexadecimal number of \d+ bits, .*; got 'layers:f{40}'"):
        CpuEngine(of, device=CPU, dtype="fp32", batch_size=2, convolutions=f"layers:{'f' * 40}")


@pytest.mark.parametrize(("speed", "name"), [(0.5, "direct"), (1.05, "direct"), (3.0, "winograd")])
def test_layers_that_agree_are_named_by_their_algorithm(cache, monkeypatch, speed, name):
    monkeypatch.delenv("NCSN_FAST_CONVOLUTIONS", raising=False)
    gains(monkeypatch, lambda layer: speed)
    assert engine(model(ngf=32)).convolutions == name


LAYERS = {Layer(16, 16, n, n, 1) for n in (4, 8)}


def test_layers_are_really_timed(cache):
    found = autotune.gains(LAYERS, "fp32", 1)
    (file,) = cache.glob("convolutions-*.json")
    speeds = json.loads(file.read_text())
    assert {*speeds} == {"fp32 16 16 4 4 1", "fp32 16 16 8 8 1"}
    assert found == {x: speeds[f"fp32 16 16 {x.height} {x.width} 1"] for x in LAYERS}


SECOND = (
    Pointwise(32, 48, 4, 4),
    Pointwise(3, 5, 7, 3),
    Attention(1, 64, 32, 32),
    Attention(2, 33, 8, 16),
)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layer", SECOND, ids=str)
def test_both_algorithms_compute_the_layer(layer, dtype):
    """Against float64; the second is the one that it says it is."""
    graph = layer.graph()
    op = graph.ops[0]
    torch.manual_seed(0)
    x = torch.randn(3, graph.input.channels, graph.input.height, graph.input.width)
    kinds = []
    for second in (False, True):
        plan = CpuPlan(graph, 3, DTYPES[dtype], products=second)
        plan.load(x)
        with torch.inference_mode():
            plan.run()
        rounded = plan.input.double()
        if isinstance(layer, Pointwise):
            spec = op.spec
            expected = F.conv2d(rounded, spec.weight.double(), spec.bias.double())
        else:
            flat = plan.input.permute(0, 2, 3, 1).flatten(1).double()
            q, k, v = (
                flat.as_strided((3, *view.shape), (flat.stride(0), *view.strides), view.offset)
                for view in (op.spec.query, op.spec.key, op.spec.value)
            )
            expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            expected = expected.mT[..., None]
        error = (plan.output.double() - expected).norm() / expected.norm()
        assert error <= BOUNDS[dtype]
        kinds.append(plan.costs[0].kind)
    first, other = (
        ("conv", "product")
        if isinstance(layer, Pointwise)
        else ("attention", "attention (products)")
    )
    # Where oneDNN has no products of the type there is nothing to choose.
    assert kinds == [first, first if plan.converts else other]


def test_second_algorithms_are_timed_and_remembered(cache):
    found = autotune.gains(SECOND[:3], "fp32", 1)
    (file,) = cache.glob("convolutions-*.json")
    speeds = json.loads(file.read_text())
    assert {*speeds} == {
        "fp32 pointwise 32 48 4 4", "fp32 pointwise 3 5 7 3", "fp32 attention 1 64 32 32"
    }  # fmt: skip
    assert [*found.values()] == [*speeds.values()]


@pytest.mark.parametrize("damage", ["cut", "a list", "empty", "negative", "text"])
def test_layers_that_are_missing_or_damaged_are_timed_anew(cache, monkeypatch, damage):
    timed = gains(monkeypatch, lambda layer: 2.0)
    autotune.gains(LAYERS, "fp32")
    (file,) = cache.glob("convolutions-*.json")
    whole = {"cut": b"{", "a list": b"[]", "empty": b""}
    broken = {"negative": -1.0, "text": "2"}
    content = (
        whole.get(damage)
        or json.dumps({"fp32 16 16 4 4 1": 3.0, "fp32 16 16 8 8 1": broken.get(damage)}).encode()
    )
    file.write_bytes(content if damage != "empty" else b"")
    forget()
    kept = 3.0 if damage in broken else 2.0
    assert autotune.gains(LAYERS, "fp32") == {x: kept if x.height == 4 else 2.0 for x in LAYERS}
    assert len(timed) == (3 if damage in broken else 4)
    assert len(json.loads(file.read_text())) == 2


def test_layers_that_another_process_times_are_waited_for(cache, monkeypatch):
    """What it has written is taken, and not timed again."""
    timed = gains(monkeypatch, lambda layer: 2.0)
    autotune.gains(LAYERS, "fp32", 1)
    (file,) = cache.glob("convolutions-*.json")
    file.unlink()
    forget()
    with ThreadPoolExecutor() as pool, filelock.FileLock(file.with_suffix(".lock")):
        asked = pool.submit(autotune.gains, LAYERS, "fp32", 1)
        time.sleep(0.2)
        assert not asked.done()
        file.write_text(json.dumps({"fp32 16 16 4 4 1": 0.5, "fp32 16 16 8 8 1": 3.0}))
    assert asked.result() == {layer: 3.0 if layer.height == 8 else 0.5 for layer in LAYERS}
    assert len(timed) == 2


def test_a_cache_that_cannot_be_written_costs_nothing(cache, caplog):
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert autotune.fastest().speed["fp32 direct"] == 1
    assert "this process measures the processor by itself" in caplog.text
    assert "the processor is measured again next time" in caplog.text


def test_that_is_told_where_logging_is_not_configured(cache, monkeypatch, capsys):
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    autotune.fastest()
    told = capsys.readouterr().err
    assert told.count("ncsn_fast: ") == 2
    assert "the processor is measured again next time" in told
