"""The cpu engine: its plan, its memory, its precision on every network, and its level loop."""

import dataclasses
import gc
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref

import own_networks
import pytest
import torch
from cross_section import cross_section
from engine_cases import (
    CPU,
    LEVELS,
    SMALLEST,
    TYPES,
    chains_of,
    float32_bound,
    lives,
    model,
    program_of,
)

from ncsn_fast import _C, EngineError, EngineUnavailable, ModelConfig, Sampler, ScoreModel, ops
from ncsn_fast.engines import precision
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.lowering import stored
from ncsn_fast.engines.lowering.graph import Graph
from ncsn_fast.engines.lowering.memory_plan import plan_memory
from ncsn_fast.engines.static_engine import lowered
from ncsn_fast.models.architectures import ARCHITECTURES
from ncsn_fast.models.refinenet import RefineNet


def engine(of, dtype="fp32", batch_size=2, kind=CpuEngine):
    return kind(of, device=CPU, dtype=dtype, batch_size=batch_size)


@pytest.mark.parametrize(
    ("arch", "dtype", "convolutions"),
    cross_section([*ARCHITECTURES], [*TYPES], ["winograd", "direct"]),
)
def test_every_network_is_within_its_bound_at_every_level(arch, dtype, convolutions, monkeypatch):
    monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", convolutions)
    torch.manual_seed(0)
    fresh = ScoreModel(ModelConfig(arch=arch, image_size=(32, 32), ngf=32, n_sigmas=LEVELS))
    built = engine(fresh, dtype)
    reference = engine(fresh, kind=EagerEngine)
    error = precision.check_precision(built, reference, LEVELS)
    assert error <= (float32_bound(fresh) if dtype == "fp32" else precision.BOUNDS[dtype])
    assert error == built.error > (1e-3 if dtype == "bf16" else 0)  # below, it was not bf16


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("size", [(8, 8), (8, 24), (32, 16)])
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_any_batch_and_size(arch, size, batch_size):
    of = model(arch, image_size=size, channels=1, ngf=5)
    x = torch.rand(batch_size, 1, *size)
    level = torch.arange(batch_size) % LEVELS
    with torch.inference_mode(), ops.backend("reference"):
        expected = of(x, level)
    f = engine(of, batch_size=batch_size).output(x, level if of.conditional else None)
    assert (f - expected).norm() <= 1e-5 * expected.norm()


def test_images_of_another_size_than_the_models():
    of, x = model(channels=1), torch.rand(2, 1, 24, 8)
    with torch.inference_mode(), ops.backend("reference"):
        expected = of(x)
    built = engine(of)
    assert (built.output(x, None) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("convolutions", ["direct", "winograd"])
def test_the_engine_does_not_keep_the_model(convolutions, monkeypatch):
    """Packed weights serve every batch and image size, so that the caller's can be freed."""
    monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", convolutions)
    of = model(ngf=32)
    built, x, small = engine(of), torch.rand(3, 3, 16, 16), torch.rand(2, 3, 8, 8)
    with torch.inference_mode(), ops.backend("reference"):
        expected = [of(x), of(small)]
    gone = weakref.ref(of.net.begin_conv.weight)
    del of
    gc.collect()
    assert gone() is None
    for f, wanted in zip(
        (built.resized(3).output(x, None), built.output(small, None)), expected, strict=True
    ):
        assert (f - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("norm", ["InstanceNorm++", "InstanceNorm"])
def test_norms_that_the_plan_covers(norm):
    assert engine(model(norm=norm)).error <= 1e-5


def test_what_cannot_be_lowered_goes_to_eager(caplog, monkeypatch):
    def forward(self, x, level=None):
        return x * float(x.sum())  # a number that depends on the image

    monkeypatch.setattr(RefineNet, "forward", forward)
    monkeypatch.setattr(stored, "key", lambda *_: None)
    of = model()
    with pytest.raises(EngineUnavailable, match=r"'cpu' does not run networks with .*'eager'"):
        Sampler(of, engine="cpu")
    with caplog.at_level(logging.INFO):
        assert Sampler(of, device="cpu").engine_class is EagerEngine
    assert "engine eager (engine 'cpu' does not run networks with a forward that" in caplog.text


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_maps_that_live_together_lie_apart(arch):
    graph = lowered(model(arch), (16, 32))
    offsets, total = plan_memory(graph, 3, 2)
    spans = lives(graph)
    size = {x: 3 * x.channels * x.height * x.width * 2 for x in spans}
    for x, y in itertools.combinations(spans, 2):
        if spans[x][0] <= spans[y][1] and spans[y][0] <= spans[x][1]:
            assert offsets[x] + size[x] <= offsets[y] or offsets[y] + size[y] <= offsets[x]
    assert max(offsets[x] + size[x] for x in spans) <= total
    assert total < sum(size.values()) / 4  # reuse is the point
    alive = max(
        sum(size[x] for x in spans if spans[x][0] <= t <= spans[x][1])
        for t in range(len(graph.ops))
    )
    assert total <= 1.3 * alive


def test_reading_a_map_that_was_overwritten_is_caught():
    graph = Graph(4, 8, 8)
    y = graph.unary("elu", "first", graph.input)
    graph.unary("elu", "second", y, in_place=True)
    graph.output = graph.unary("elu", "third", y)
    with pytest.raises(AssertionError, match="third reads a map that was overwritten"):
        plan_memory(graph, 1, 4)


def test_bits_are_those_of_every_level_of_instructions():
    built, x = engine(model(), SMALLEST), torch.rand(2, 3, 16, 16)
    outputs = []
    for isa in ops.available()["isa_usable"]:
        with ops.isa(isa):
            outputs.append(built.output(x, None))
    assert all(torch.equal(f, outputs[0]) for f in outputs)


def test_a_step_of_pytorch_may_fail_and_is_let_go():
    class Step:
        def __call__(self):
            raise ZeroDivisionError("in a step")

    step, plan = Step(), _C.Plan(*onednn.addresses())
    gone = weakref.ref(step)
    plan.callback(step)
    del step
    for run in (plan.run, plan.profile):
        with pytest.raises(ZeroDivisionError, match="in a step"):
            run(-1)
    del plan, run  # a bound method holds the plan
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_a_run_that_was_cut_anywhere_continues_exactly(arch, dtype):
    of = model(arch)
    built, program = engine(of, dtype), program_of(of)
    whole = built.run(program, chains_of(of)).clone()
    for start in (1, 4, program.nfe - 1):
        chains = chains_of(of)
        built.run(program.head(start), chains)
        assert torch.equal(built.run(program, chains, start=start), whole)


def test_a_cut_inside_a_level_keeps_the_bits_of_a_scaled_input():
    """The update rounds scale x + shift once, and so does what loads a state."""
    of = own_networks.model("edm")
    built, program = engine(of, "fp32"), program_of(of, n_steps_each=2)
    whole = built.run(program, chains_of(of)).clone()
    for start in (3, 5, 9):
        chains = chains_of(of)
        built.run(program.head(start), chains)
        assert torch.equal(built.run(program, chains, start=start), whole)


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_the_level_loop_is_the_plain_loop(arch):
    """The update in C++ writes the next input; the plain loop copies the state each step."""
    of = model(arch)
    built, program = engine(of, SMALLEST), program_of(of)

    class Plain(CpuEngine):
        _stepper = Engine._stepper

    assert torch.equal(
        built.run(program, chains_of(of)),
        engine(of, SMALLEST, kind=Plain).run(program, chains_of(of)),
    )


def test_one_call_runs_a_level(monkeypatch):
    calls, original = [], CpuEngine._sample
    monkeypatch.setattr(
        CpuEngine, "_sample", lambda self, *a: calls.append(a[-2:]) or original(self, *a)
    )
    Sampler(model(), engine="cpu", batch_size=2).sample(2, progress=False)
    assert calls == [(2 * i, 2 * i + 2) for i in range(LEVELS)] + [(2 * LEVELS, 2 * LEVELS + 1)]


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, even where the suite was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_level_is_left_at_ctrl_c():
    built = engine(model(), batch_size=1)
    built.run(program_of(built.model, n_steps_each=1), chains_of(built.model, 1))
    gc.collect()  # Python swallows a signal that meets a callback of weak references
    program = program_of(built.model, n_steps_each=3000)
    done = []
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        built.run(program, chains_of(built.model, 1), on_level=done.append)
    timer.join()
    assert not done
    assert torch.isfinite(built.output(torch.zeros(1, 3, 16, 16), None)).all()


@pytest.mark.skipif(
    bool(_C.build_info()["sanitizers"]), reason="AddressSanitizer's shadow memory takes page faults"
)
def test_a_level_takes_no_new_memory():
    """Minor page faults count fresh pages: steps 3 to 400 of a level touch none, but for noise."""
    built = engine(model(ngf=32), SMALLEST, batch_size=8)
    chains = chains_of(built.model, 8)
    built.run(program_of(built.model, n_steps_each=2), chains)
    program = program_of(built.model, n_steps_each=60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    built.run(program, chains)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    maps = built._plan((16, 16)).map_bytes
    assert faults * 4096 < maps, f"{faults} page faults in {program.nfe} steps"


MEMORY = """
import torch, ncsn_fast
torch.set_num_threads(1)
sampler = ncsn_fast.Sampler("digits", engine="cpu", batch_size=64)
options = {"method": "cas", "steps": 3, "progress": False}
def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096
sampler.sample(64, **options)
first = rss()
for _ in range(16):
    sampler.sample(64, **options)
print(rss() - first)
"""


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_samples():
    out = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) < 4e6


@pytest.mark.parametrize("convolutions", ["direct", "winograd"])
def test_one_thread_is_one_thread(convolutions):
    """A process that computes on two cores uses more processor time than passes."""
    of = model(ngf=32, image_size=(32, 32))
    built = CpuEngine(
        of, device=CPU, dtype=SMALLEST, batch_size=4, threads=1, convolutions=convolutions
    )
    program = program_of(of, n_steps_each=4)
    built.run(program, chains_of(of, 4))
    time.sleep(0.3)  # threads of earlier work stop spinning
    wall, busy = time.perf_counter(), time.process_time()
    built.run(program, chains_of(of, 4))
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    assert busy < 1.2 * wall


def test_memory_is_told(monkeypatch):
    monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", "direct")
    sampler = Sampler(model(), engine="cpu", dtype="fp32", batch_size=4)
    plan, built = sampler.plan(4), sampler.engine_for(4)
    weights = 4 * sum(p.numel() for p in sampler.model.net.parameters())
    chains = 2 * 4 * 4 * 3 * 16 * 16
    maps = built._plan((16, 16)).map_bytes
    assert weights <= plan.memory - maps - chains <= 1.2 * weights  # some kernels are 4x4, padded
    assert f"{plan.memory / 1e6:.4g} MB beside the model" in str(plan)
    assert Sampler(model(), engine="eager").plan(1).memory is None
    assert "beside the model" not in str(Sampler(model(), engine="eager").plan(1))


def test_describe_lists_every_operation():
    built = CpuEngine(
        model(ngf=32), device=CPU, dtype=SMALLEST, batch_size=2, convolutions="winograd"
    )
    head, *lines, total = built.describe().splitlines()
    graph = lowered(built.model, (16, 16))
    assert head.split()[:2] == ["operation", "name"]
    kinds = [line.split()[0].replace("winograd", "conv") for line in lines]
    assert kinds == [op.kind for op in graph.ops]
    assert [line.split()[1] for line in lines] == [op.name for op in graph.ops]
    assert total.startswith(f"{len(graph.ops)} operations in {SMALLEST}, ")
    assert sum(float(line.split()[-1].rstrip("%")) for line in lines) == pytest.approx(100, abs=10)
    assert all(("GFLOP/s" in line) == line.startswith(("conv", "winograd")) for line in lines)
    assert {"conv", "winograd", "norm", "elu"} < {line.split()[0] for line in lines}
    assert "plain PyTorch" in engine(model(), kind=EagerEngine).describe()


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match="runs batches of 2; got 3 images"):
        engine(model()).network(torch.rand(3, 3, 16, 16), None)
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\); got \(2, 1, 16, 16\)"):
        engine(model()).network(torch.rand(2, 1, 16, 16), None)
    with pytest.raises(ValueError, match=r"pass level \(N,\)"):
        engine(model("ncsn")).network(torch.rand(2, 3, 16, 16), None)
    with pytest.raises(ValueError, match=r"levels must be in \[0, 6\); got levels\[1\] = 6"):
        engine(model("ncsn")).network(torch.rand(2, 3, 16, 16), torch.tensor([0, 6]))


def test_a_wrong_engine_is_caught_in_float32(monkeypatch):
    pack = CpuPlan._add_convolution

    def wrong(self, op, of):
        return pack(self, op, dataclasses.replace(of, bias=None) if op.name == "end_conv" else of)

    monkeypatch.setattr(CpuPlan, "_add_convolution", wrong)
    with pytest.raises(
        EngineError, match=r"'cpu' in fp32 \([\w:]+\) differs from .* use engine='eager'"
    ):
        engine(model())


def test_the_check_visits_real_images_all_over_the_ladder():
    of = model(n_sigmas=40)
    x, levels = precision.probes(of, 40)
    assert (x.shape, levels.tolist()) == ((40, 3, 16, 16), list(range(40)))
    clean = x[of.sigmas < 0.02].double()
    assert len(clean)
    assert -0.1 < clean.min() < clean.max() < 1.1
    assert clean.std() > 0.1
    counts = [precision.probe_count(of, flop) for flop in (0.0, 1e9, 2e10, 1e12)]
    assert counts == [40, 40, 12, 3]
    assert precision.probe_count(model(n_sigmas=2), 1e13) == 2
