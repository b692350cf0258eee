"""The engine for GPUs, rehearsed on the CPU: the same steps, uncaptured, on the extension."""

import contextlib
import dataclasses
import itertools
import re

import networks
import own_networks
import pytest
import torch
from cross_section import cross_section
from engine_cases import CPU, LEVELS, chains_of, model, program_of
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_fast import EngineError, ModelConfig, Sampler, SamplingError, ScoreModel, ops, wrap
from ncsn_fast.engines import precision
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cuda import graph_engine
from ncsn_fast.engines.cuda import kernels as gpu_kernels
from ncsn_fast.engines.cuda import loop as cuda_loop
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.cuda.graphs import Graphs
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.inference.runner import Job, run
from ncsn_fast.models.architectures import ARCHITECTURES
from ncsn_fast.ops import backends
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program_transforms import inpainting, interpolation_weights

# Rounding grows along a chain, and states begin at sigma 5.
CLOSE = {"rtol": 0.0, "atol": 2e-3}


def engine(of, dtype="fp32", batch_size=2, kind=CudaEngine, **options):
    if kind is CudaEngine:
        options = {"kernels": "cuda", **options}
    return kind(of, device=CPU, dtype=dtype, batch_size=batch_size, **options)


@pytest.fixture
def captured(monkeypatch):
    """Graphs as on a GPU, but for the capture: [(calls)] of those of rows, in order."""
    captures = []

    def capture(self, calls, step, warm_up):
        warm_up()
        if step != warm_up:  # which has no side effects where no row is run
            captures.append(calls)
        return lambda: [step() for _ in range(calls)]

    monkeypatch.setattr(Graphs, "_capture", capture)
    return captures


@pytest.mark.parametrize(
    ("arch", "dtype"),
    cross_section(
        [*ARCHITECTURES],
        ["fp32", "tf32", "bf16"],
        # Narrow NCSN (2019) networks with random weights are beyond bfloat16: 71 norms in a row.
        where=lambda arch, dtype: dtype != "bf16" or arch.startswith("ncsnv2"),
    ),
)
def test_every_network_is_within_its_bound_at_every_level(arch, dtype):
    torch.manual_seed(0)
    fresh = ScoreModel(ModelConfig(arch=arch, image_size=(32, 32), ngf=32, n_sigmas=LEVELS))
    built, reference = engine(fresh, dtype), engine(fresh, kind=EagerEngine)
    error = precision.check_precision(built, reference, LEVELS)
    assert error <= (1e-5 if dtype == "tf32" else precision.BOUNDS[dtype])  # no TF32 on a CPU
    assert error == built.error > (1e-3 if dtype == "bf16" else 0)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (8, 24), (32, 16)])
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_any_batch_size_and_channels(arch, size, batch_size):
    of = model(arch, image_size=size, channels=batch_size, ngf=5)
    x = torch.rand(batch_size, batch_size, *size)
    level = torch.arange(batch_size) % LEVELS
    with torch.inference_mode(), ops.backend("reference"):
        expected = of(x, level)
    f = engine(of, batch_size=batch_size).output(x, level if of.conditional else None)
    assert (f - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("arch", "method", "graph"),
    cross_section(["ncsnv2", "ncsn"], ["ald", "cas"], ["level", "step", "loop", "none"]),
)
def test_runs_are_those_of_the_reference(arch, method, graph, captured):
    of = model(arch)
    program = program_of(of, method)
    expected = engine(of, kind=EagerEngine).run(program, chains_of(of))
    built, told = engine(of, graph=graph), []
    x = built.run(program, chains_of(of), on_level=told.append)
    torch.testing.assert_close(x, expected, **CLOSE)
    ends = [rows.stop for rows in program.level_rows()]
    assert told == (ends if graph != "loop" else [program.nfe])
    each = 2 if method == "ald" else 1
    assert captured == {"level": sorted({each, 1}, reverse=True), "loop": [program.nfe]}.get(
        graph, [1]
    )


@pytest.mark.parametrize("method", ["heun", "dpmpp", "ancestral"])
def test_other_tables_run_as_the_reference_runs_them(method, captured):
    of = model()
    program = methods.build(method, of, 5, {})
    expected = engine(of, kind=EagerEngine).run(program, chains_of(of))
    torch.testing.assert_close(engine(of).run(program, chains_of(of)), expected, **CLOSE)
    assert program.has_history == (method != "ancestral")


@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
def test_known_pixels_second_noise_and_history(variant, captured):
    of = model()
    program = inpainting(program_of(of), variant)
    momentum = torch.linspace(-0.2, 0.2, program.nfe, dtype=torch.float64).numpy()
    program = dataclasses.replace(program, g=momentum, p=0.3 * momentum, q=momentum)
    results = []
    for built in (engine(of), engine(of, kind=EagerEngine)):
        chains = chains_of(of)
        chains.mask = torch.rand(chains.x.shape, generator=torch.Generator().manual_seed(1)) > 0.6
        chains.known = torch.rand(chains.x.shape, generator=torch.Generator().manual_seed(2))
        chains.noise_weights = interpolation_weights(2).float()
        results.append((built.run(program, chains), chains.h))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    plain = engine(of).run(program_of(of), chains_of(of))
    assert (results[0][0] - plain).abs().max() > 0.1


def test_a_graph_is_captured_once(captured):
    """For all levels, calls and seeds; and for what an update can have besides, once more."""
    of = model()
    built, program = engine(of), program_of(of)
    fresh = {seed: engine(of).run(program, chains_of(of, seed=seed)).clone() for seed in (3, 9)}
    captured.clear()
    for seed in (3, 9, 3):
        assert torch.equal(built.run(program, chains_of(of, seed=seed)), fresh[seed])
    assert captured == [2, 1]
    built.run(program_of(of, n_steps_each=5), chains_of(of))
    assert captured == [2, 1, 5]
    chains = chains_of(of)
    chains.noise_weights = interpolation_weights(2).float()
    built.run(program, chains)
    assert captured == [2, 1, 5, 2, 1]


def test_long_levels_are_several_graphs(captured, monkeypatch):
    monkeypatch.setattr(cuda_loop, "MAX_UNROLLED", 4)
    of = model(n_sigmas=2)
    program = program_of(of, n_steps_each=11)
    x = engine(of).run(program, chains_of(of))
    assert captured == [4, 3, 1]
    assert torch.equal(x, engine(of, graph="none").run(program, chains_of(of)))


def test_programs_of_more_rows_get_longer_tables(captured, monkeypatch):
    monkeypatch.setattr(cuda_loop, "_MIN_ROWS", 4)
    of = model("ncsn", n_sigmas=3)
    built, short, long = engine(of), program_of(of, "cas"), program_of(of, n_steps_each=7)
    expected = engine(of).run(long, chains_of(of))
    first = built.run(short, chains_of(of)).clone()
    captured.clear()
    assert torch.equal(built.run(long, chains_of(of)), expected)
    assert torch.equal(built.run(short, chains_of(of)), first)
    assert captured == [7, 1]  # the graphs of the short table were given up


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_a_run_that_was_cut_anywhere_continues_exactly(arch):
    of = model(arch)
    built, program = engine(of, "fp32"), program_of(of)
    whole = built.run(program, chains_of(of)).clone()
    for start in (1, 4, program.nfe - 1):
        chains = chains_of(of)
        built.run(program.head(start), chains)
        assert torch.equal(built.run(program, chains, start=start), whole)


def test_two_runs_may_take_turns():
    """One engine's memory serves both; each finds its own chains again."""
    of = model("ncsn")
    built, program = engine(of), program_of(of)
    alone = [built.run(program, chains_of(of, seed=s)).clone() for s in (1, 2)]
    both = [chains_of(of, seed=s) for s in (1, 2)]
    for rows in program.level_rows():
        for chains in both:
            built.run(program.head(rows.stop), chains, start=rows.start)
        built.output(torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    for chains, x in zip(both, alone, strict=True):
        assert torch.equal(chains.x, x)


class Ledger(TorchDispatchMode):
    """Every operation that reaches a device, and the memory it wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (list, tuple)) else [result]
        at = tuple(t.data_ptr() for t in tensors if isinstance(t, torch.Tensor))
        self.calls.append((str(func), at))
        return result


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_steps_read_nothing_back_and_are_all_alike(arch):
    """A capture allows no wait for the device, and takes the addresses of one step for all."""
    of = model(arch)
    built, program = engine(of), program_of(of)
    with built.context():
        run = built.stepper(program, chains_of(of), torch.zeros(program.nfe, dtype=int), None)
        run(0, 1)
        loop = built.loop((16, 16))
        static = (loop.x, loop.plan.input, loop.plan.output, loop.counter, loop.nonfinite)
        before, steps = [t.data_ptr() for t in static], []
        for _ in range(4):
            with Ledger() as ledger:
                loop.step()
            steps.append(ledger.calls)
    names = [[name for name, _ in calls] for calls in steps]
    assert not [n for n in names[0] if "local_scalar" in n or "item" in n or "nonzero" in n]
    assert all(other == names[0] for other in names[1:])
    assert len(names[0]) > 75
    # Every step writes the same static memory; what CPU convolutions allocate is freed at once.
    loops = (loop.x, loop.plan.input, loop.plan.output, loop.counter, loop.nonfinite)
    assert [t.data_ptr() for t in loops] == before
    written = [{at for name, ats in calls if name.endswith("copy_.default") for at in ats}
               for calls in steps]  # fmt: skip
    assert all(other == written[0] for other in written[1:])
    assert loop.counter.item() == 5


@pytest.mark.parametrize("name", ["classes", "edm", "points"])
def test_steps_of_users_networks_are_all_alike(name):
    """What depends on the level alone is read from a table; with classes, it is computed."""
    of = own_networks.model(name)
    built, program, chains = engine(of), program_of(of), chains_of(of)
    chains.labels = torch.tensor([2, 0]) if of.n_classes else None
    with built.context():
        levels = built.condition(torch.from_numpy(program.sigma))
        built.stepper(program, chains, levels, None)(0, 1)
        loop, steps = built.loop(of.config.image_size), []
        for _ in range(3):
            with Ledger() as ledger:
                loop.step()
            steps.append(ledger.calls)
    names = [[name for name, _ in calls] for calls in steps]
    assert not [n for n in names[0] if "local_scalar" in n or "item" in n or "nonzero" in n]
    assert all(other == names[0] for other in names[1:])
    written = [{at for name, ats in calls if name.endswith("copy_.default") for at in ats}
               for calls in steps]  # fmt: skip
    assert all(other == written[0] for other in written[1:])
    assert ("aten.sin.default" in names[0]) == (name == "classes")


def test_calls_of_the_network_share_a_graph(captured):
    """Guidance, procedures and checks call it between rows; nothing of a row is run again."""
    of = model("ncsn")
    built, program = engine(of), program_of(of)
    alone = built.run(program, chains_of(of)).clone()
    x, level = torch.rand(2, 3, 16, 16), torch.tensor([0, 4])
    with built.context():
        first = built.network(x, level)
        assert not torch.equal(built.network(x, level.flip(0)), first)
        assert torch.equal(built.network(x, level), first)
    assert ("network", 1) in built.loop((16, 16)).graphs._replays
    assert torch.equal(built.run(program, chains_of(of)), alone)
    assert captured == [2, 1]


def test_levels_are_tabulated_once(captured):
    """For each distinct level, and anew where a program has others."""
    of = own_networks.model("edm")
    built, program = engine(of), program_of(of, n_steps_each=2)
    first = built.run(program, chains_of(of)).clone()
    loop = built.loop((8, 8))
    assert len(loop.tabulated) == LEVELS
    assert captured == [2, 1]
    cut = chains_of(of)
    built.run(program.head(5), cut)  # a table of fewer levels
    assert torch.equal(built.run(program, cut, start=5), first)
    address = loop.table.data_ptr()
    few = methods.build("euler", of, 3, {})
    expected = engine(of, kind=EagerEngine).run(few, chains_of(of))
    torch.testing.assert_close(built.run(few, chains_of(of)), expected, **CLOSE)
    assert len(loop.tabulated) == 3
    assert torch.equal(built.run(program, chains_of(of)), first)
    assert captured == [2, 1]
    assert loop.table.data_ptr() == address
    many = methods.build("euler", of, 20, {})
    expected = engine(of, kind=EagerEngine).run(many, chains_of(of))
    torch.testing.assert_close(built.run(many, chains_of(of)), expected, **CLOSE)
    assert captured == [2, 1, 1]  # the graphs of the short table were given up


def test_what_waits_for_the_gpu_is_not_captured(caplog, captured):
    of = wrap(networks.Masked(), predicts="epsilon", image_shape=(1, 8, 8), sigma_min=0.1,
              sigma_max=2.0, n_sigmas=3)  # fmt: skip
    built, program = engine(of), program_of(of)
    assert "waits for the GPU in this network (aten.index_put.default in " in caplog.text
    expected = engine(of, kind=EagerEngine).run(program, chains_of(of))
    torch.testing.assert_close(built.run(program, chains_of(of)), expected, **CLOSE)
    assert not built.loop((8, 8)).graphs.captures
    caplog.clear()
    engine(of, graph="none")
    assert not caplog.text


@pytest.mark.parametrize("failure", [RuntimeError, torch.OutOfMemoryError])
def test_a_capture_that_fails_is_told_once(failure, monkeypatch, caplog):
    """The calls are made one by one then; but a full memory halves the micro-batch."""

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def capture(*_):
        yield
        raise failure("operation not permitted when stream is capturing\nmore")

    for name, value in (
        ("CUDAGraph", Stream), ("current_stream", lambda _: Stream()), ("graph", capture),
        ("stream", lambda _: contextlib.nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    graphs, made = Graphs(CPU, captures=True), []
    graphs.captures, graphs._stream, graphs._pool = True, Stream(), None
    if failure is not RuntimeError:
        with pytest.raises(torch.OutOfMemoryError):
            graphs.repeat("a", 1, lambda: None, lambda: None)
        return
    for key, calls in (("a", 2), ("a", 2), ("b", 1)):
        made.clear()
        graphs.repeat(key, calls, lambda: made.append("step"), lambda: made.append("warm-up"))
        assert made[-calls:] == ["step"] * calls
    assert made == ["step"]
    assert caplog.text.count("no CUDA graph of this network can be captured (operation not") == 1
    assert not graphs.captures


@pytest.mark.parametrize("name", [None, "classes"])
def test_memory_does_not_grow_with_steps(name):
    of = model() if name is None else own_networks.model(name)
    built, program = engine(of), program_of(of, n_steps_each=4)
    built.run(program, chains_of(of))
    loop = built.loop(of.config.image_size)
    with torch.profiler.profile(profile_memory=True) as profile, built.context():
        for _ in range(3):
            loop.step()
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


def test_a_lost_chain_is_named(captured):
    of = model()
    built, program = engine(of), program_of(of)
    init = torch.rand(5, 3, 16, 16)
    job = Job(torch.arange(10, 15), init=init)
    assert len(list(run(built, program, job, 0, progress=False))) == 3
    init[3, 1, 2, 3] = float("nan")
    message = r"sample 13 of seed 7 is no longer finite at level 0 \(sigma 5\)"
    with pytest.raises(SamplingError, match=message):
        list(run(built, program, job, 7, progress=False))
    init[3, 1, 2, 3] = 0.5
    scale = program.a.copy()
    scale[5] = 1e39  # overflows float32 in level 2
    with pytest.raises(SamplingError, match=r"sample 10 of seed 7 .* at level 2 "):
        list(run(built, dataclasses.replace(program, a=scale), job, 7, progress=False))
    assert len(list(run(built, program, job, 0, progress=False))) == 3  # flags are cleared


def test_a_loop_of_too_many_launches_is_refused(monkeypatch):
    of = model()
    built = engine(of, graph="loop")
    program = program_of(of)
    launches = program.nfe * (len(built.loop((16, 16)).plan.steps) + 2)
    monkeypatch.setattr(graph_engine, "MAX_NODES", launches - 1)
    with pytest.raises(ValueError, match=f"would capture {launches} launches for 13 .*'level'"):
        built.run(program, chains_of(of))


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="runs batches of 2; got 3 images"):
        engine(model()).network(torch.rand(3, 3, 16, 16), None)
    with pytest.raises(ValueError, match="pass level"):
        engine(model("ncsn")).network(torch.rand(2, 3, 16, 16), None)
    for name, value in itertools.product(("graph", "kernels", "tune"), ("x", True)):
        with pytest.raises(ValueError, match=f"'cuda' has no option {name}={value!r}; its options"):
            engine(model(), **{name: value})
    with pytest.raises(ValueError, match="kernels must be 'triton' or 'cuda'; got 'hip'"):
        gpu_kernels.load("hip", CPU)


def test_the_cuda_family_needs_an_extension_with_cuda(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda family: "built without CUDA: rebuild")
    with pytest.raises(RuntimeError, match=r"kernels='cuda': built without CUDA.*kernels='triton'"):
        gpu_kernels.load("cuda", torch.device("cuda"))


def test_describe_and_memory():
    built = engine(model(), "bf16")
    head, *lines, total = built.describe().splitlines()
    plan = built.loop((16, 16)).plan
    assert head.split()[:2] == ["operation", "name"]
    assert [line.split()[0] for line in lines] == [op.kind for op in plan.graph.ops]
    assert total.startswith(f"{len(plan.graph.ops)} operations in bf16, ")
    assert built.memory() > plan.weight_bytes + plan.map_bytes > plan.weight_bytes
    two, four = engine(model()), engine(model(), batch_size=4)
    assert four.loop((16, 16)).plan.map_bytes > 1.5 * two.loop((16, 16)).plan.map_bytes
    assert two.resized(4)._weights is two._weights


def test_describe_names_what_pytorch_runs():
    built = engine(own_networks.model("unet"))
    _, *lines, total = built.describe().splitlines()
    found = {line.split("  ")[0] for line in lines}
    assert {"conv", "group_norm", "pointwise", "attention (torch)", "concat (torch)"} < found
    assert all(line.endswith("%") for line in lines)
    assert re.search(r"% of it convolutions at \S+ GFLOP/s, [\d.]+% PyTorch's; weights", total)


class Full(CpuEngine):
    """A GPU's memory in which micro-batches of at most `fits` find room."""

    fits = 2

    def run(self, *args, **options):
        if self.batch_size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(*args, **options)


def test_a_full_gpu_halves_the_micro_batch_once(caplog, monkeypatch):
    of = model()
    sampler = Sampler(of, engine="cpu", dtype="fp32", batch_size=4)
    sampler._pool.kind = Full
    samples = sampler.sample(7, progress=False)
    assert "micro-batches of 4; going on with 2, so choose batch_size=2" in caplog.text
    expected = Sampler(of, engine="cpu", dtype="fp32", batch_size=2).sample(7, progress=False)
    assert torch.equal(samples, expected)
    assert (sampler.batch_size, sampler.report.batch_size) == (2, 2)
    assert torch.equal(sampler.sample(3, progress=False), expected[:3])
    monkeypatch.setattr(Full, "fits", 1)
    with pytest.raises(EngineError, match=r"of 2; free memory .* a smaller batch_size"):
        sampler.sample(3, progress=False)


def test_memory_that_fills_up_later_loses_nothing(caplog, monkeypatch):
    """What was yielded before stays, and the rest goes on where it was."""
    of = model()
    sampler = Sampler(of, engine="cpu", dtype="fp32", batch_size=4)
    sampler._pool.kind = Full
    monkeypatch.setattr(Full, "fits", 4)
    work = sampler.stream(range(9), progress=False)
    first, _ = next(work)
    monkeypatch.setattr(Full, "fits", 2)
    rest = [samples.tolist() for samples, _ in work]
    assert (first.tolist(), rest) == ([0, 1, 2, 3], [[4, 5], [6, 7], [8]])
