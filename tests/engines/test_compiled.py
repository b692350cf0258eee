"""engine="compile": every network as in eager, in every type; one real compilation, else stand-ins.

Compiling takes half a minute even for the smallest network, and is for `make test-all`. What does
not need machine code runs with a backend that takes the compiler's graph as it is.
"""

import engine_cases
import pytest
import torch
from architectures import model
from cross_section import SLOW, cross_section
from drawing import CLOSE, draw

from ncsn_fast import EngineError, EngineUnavailable, Sampler, engines
from ncsn_fast.engines import compiled, precision
from ncsn_fast.engines.compiled import CompileEngine
from ncsn_fast.ops import backends

CPU = torch.device("cpu")
MODES = CompileEngine.options["mode"]


def smallest(conditional=False, **fields):
    """A network of one stage: every operation costs the compiler's time."""
    return engine_cases.small(conditional, stages=1, **fields)


def engine(of, **settings):
    usual = {"device": CPU, "dtype": "fp32", "batch_size": 2, "threads": 1}
    return CompileEngine(of, **{**usual, **settings})


def stand_in(monkeypatch, run):
    """torch.compile with a compiler of ours; returns the list of graphs that it will be given."""
    seen, compile_ = [], torch.compile

    def backend(graph, inputs):
        seen.append(graph)
        return run(graph, inputs)

    def compile_here(network, *, mode, **options):
        assert mode in MODES
        assert options == {"dynamic": False, "fullgraph": True}
        return compile_(network, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_here)
    torch._dynamo.reset()
    return seen


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that the compiler is given; they run as they are."""
    yield stand_in(monkeypatch, lambda graph, inputs: graph.forward)
    torch._dynamo.reset()


@pytest.fixture
def primitives(monkeypatch):
    """Graphs that the compiler is given; they run in the primitive operations that it fuses."""
    import torch._dynamo

    yield stand_in(monkeypatch, torch._dynamo.lookup_backend("aot_eager_decomp_partition"))
    torch._dynamo.reset()


def test_a_path_with_a_space_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/a b/torch/__init__.py")
    said = compiled._failure(RuntimeError("/usr/bin/ld: cannot find -ltorch"))
    assert "a folder above torch has a space in its name (/home/a b/torch)" in said
    assert said.endswith("or use engine='eager'")


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile needs a path without spaces")
def test_samples_are_eagers():
    of = engine_cases.small()
    settings = {"device": "cpu", "batch_size": 2, "threads": 1}
    sampler = Sampler(of, engine="compile", **settings)
    assert sampler.dtype == "fp32"
    ours = Sampler(of, engine="compile", dtype="fp32", **settings)
    first = draw(ours, 3)
    torch.testing.assert_close(first, draw(Sampler(of, engine="eager", **settings), 3), **CLOSE)
    assert torch.equal(draw(ours, 3), first)
    assert torch.equal(draw(ours, 1, start=2), first[2:])
    built = ours.engine_for(2)
    assert 0 < built.error < precision.BOUNDS["fp32"]
    with built.context():
        x = torch.rand(2, *of.image_shape)
        kept = built.network(x, None)
        before = kept.clone()
        built.network(x + 1, None)
    assert torch.equal(kept, before)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        *cross_section(["ncsnv2", "unet_a", "unet_b"], ["fp32", "bf16"]),
        *(pytest.param("ncsn", dtype, marks=SLOW) for dtype in ("fp32", "bf16")),
    ],
)
def test_scores_are_eagers(arch, dtype, primitives):
    unet = arch.startswith("unet")
    of = model(arch, channels=3) if unet else engine_cases.small(conditional=arch == "ncsn")
    ours = Sampler(of, engine="compile", dtype=dtype, device="cpu", batch_size=2, threads=1)
    eager = Sampler(of, engine="eager", device="cpu", batch_size=2, threads=1)
    sigma = torch.tensor([5.0, 0.5])
    x = torch.rand(2, *of.image_shape, generator=torch.Generator().manual_seed(0))
    score, expected = ours.score(x, sigma), eager.score(x, sigma)
    assert score.dtype is torch.float32
    errors = (score - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # In float32, eager's channels-last group norm is that far off.
    assert errors.max() < (3e-5 if unet and dtype == "fp32" else precision.BOUNDS[dtype])
    (graph,) = primitives  # the check and the scores are of one shape
    assert not [node for node in graph.graph.nodes if "ncsn_fast" in str(node.target)]


@pytest.mark.parametrize("arch", ["ncsn", "unet_b"])
def test_types_inside(arch, graphs):
    of = model(arch) if arch == "unet_b" else smallest(conditional=True)
    built = engine(of, dtype="bf16")
    for name, tensor in built.replica.named_parameters():
        module = built.replica.get_submodule(name.rpartition(".")[0])
        convolves = isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
        assert tensor.dtype is (torch.bfloat16 if convolves else torch.float32), name
        assert not convolves or tensor.ndim != 4 or _channels_last(tensor), name
    assert 1e-4 < built.error < precision.BOUNDS["bf16"]


def _channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("arch", "channels"), [("ncsnv2", 1), ("ncsn", 3), ("unet_b", 1)])
def test_one_compilation_serves_all_calls_of_a_shape(arch, channels, graphs):
    """Whatever tensors look like inside: strides of expanded levels and of a single channel."""
    if arch == "unet_b":
        of = model(arch, channels=channels, image_size=(28, 28))
    else:
        of = smallest(conditional=arch == "ncsn", channels=channels)
    sampler = Sampler(of, engine="compile", dtype="fp32", device="cpu", batch_size=2, threads=1)
    draw(
        sampler,
        3,
        method="ald" if arch == "ncsn" else "heun",
        **({} if arch == "ncsn" else {"steps": 2}),
    )
    x = torch.rand(2, 28, 28, channels)[:, : of.config.image_size[0], : of.config.image_size[1]]
    sampler.score(x.permute(0, 3, 1, 2), 0.5)
    with sampler.engine_for(2).context():
        sampler.engine_for(2).network(torch.rand(2, *of.image_shape), of.condition(torch.ones(2)))
    assert len(graphs) == 1


def test_every_shape_is_compiled_once_and_engines_share_it(graphs):
    built, sizes = engine(smallest()), (1, 2, 3)
    with torch._dynamo.config.patch(recompile_limit=1):  # by itself torch stops at eight
        for n in (*sizes, *sizes):
            other = built.resized(n)
            assert other.replica is built.replica
            with other.context():
                assert len(other.network(torch.rand(n, 3, 8, 8), None)) == n
        assert len(graphs) == len(sizes)
        with built.context():
            built.network(torch.rand(2, 3, 16, 8), None)
    assert len(graphs) == len(sizes) + 1


def test_weights_are_held_once_and_changes_not_seen(graphs):
    of = smallest().train()
    built, x = engine(of), torch.rand(2, 3, 8, 8)
    before = built.output(x, None)
    with torch.no_grad():
        of.net.end_conv.weight.mul_(2)
    assert of.training
    assert torch.equal(built.output(x, None), before)
    assert {p.untyped_storage().nbytes() for p in built.model.parameters()} == {4}
    with torch.inference_mode():  # a model and an engine that are born here
        inside = engine(smallest())
    assert torch.equal(inside.output(x, None), before)


def test_settings_of_the_caller_stay(graphs):
    import torch._dynamo.config
    import torch._inductor.config

    def settings():
        return (
            torch._dynamo.config.recompile_limit,
            torch._inductor.config.freezing,
            torch.get_num_threads(),
        )

    before, during = settings(), []
    built = engine(smallest(), threads=before[2] + 1)
    assert settings() == before
    run = built._run
    built._run = lambda x, level: during.append(settings()) or run(x, level)
    with built.context():
        built.network(torch.rand(2, 3, 8, 8), None)
        assert settings() == (*before[:2], before[2] + 1)
    ((limit, freezing, threads),) = during
    assert limit > 1000
    assert (freezing, threads) == (True, before[2] + 1)
    assert settings() == before


def test_results_of_cuda_graphs_are_copied(graphs, monkeypatch):
    built = engine(smallest())
    begun, same = [], torch.ones(2, 3, 8, 8)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    built._run, built._graphs = (lambda x, level: same), True
    f = built.network(torch.rand(2, 3, 8, 8), None)
    assert torch.equal(f, same)
    assert f.data_ptr() != same.data_ptr()
    assert begun == [1]


def test_a_compiler_that_fails(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("gave up\n/usr/bin/ld: cannot find -ltorch\nmuch more")

    stand_in(monkeypatch, broken)
    words = r"torch\.compile fails here: .* cannot find -ltorch; use engine='eager'$"
    with pytest.raises(EngineUnavailable, match=words):
        engine(smallest())


def test_too_low_a_precision(graphs, monkeypatch):
    monkeypatch.setitem(precision.BOUNDS, "bf16", 1e-4)
    with pytest.raises(EngineError, match=r"'compile' in bf16 differs .* use dtype='fp32'"):
        engine(smallest(), dtype="bf16")


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, graphs):
    of = smallest()
    if mode in ("default", "max-autotune-no-cudagraphs"):
        assert engine(of, mode=mode).error < precision.BOUNDS["fp32"]
    else:
        with pytest.raises(ValueError, match=f"mode='{mode}' makes CUDA graphs; on a CPU use"):
            engine(of, mode=mode)


def test_bad_settings_and_calls(graphs):
    of = engine_cases.small(conditional=True)
    with pytest.raises(ValueError, match=r"'compile' has no option mode='fast'; .* mode: default"):
        Sampler(of, engine="compile", mode="fast", device="cpu")
    for dtype in ("fp16", "tf32"):
        with pytest.raises(EngineError, match=f"{dtype} on GPUs only; use dtype='bf16' or 'fp32'"):
            engine(of, dtype=dtype)
    built = engine(of)
    with pytest.raises(ValueError, match="runs batches of 2; got 3 images"):
        built.network(torch.rand(3, *of.image_shape), None)
    with pytest.raises(ValueError, match=r"conditioned on the noise level: pass level \(N,\)"):
        built.network(torch.rand(2, *of.image_shape), None)
    with pytest.raises(ValueError, match="got 9x9"):
        built.network(torch.rand(2, 3, 9, 9), None)


def test_the_type_without_one_asked_for(monkeypatch):
    supported = [True]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported[0])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [CompileEngine.default_dtype(place) for place in (cpu, gpu)] == ["fp32", "bf16"]
    supported[0] = False
    assert [CompileEngine.default_dtype(place) for place in (cpu, gpu)] == ["fp32", "fp16"]


def test_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "missing", lambda name: f"{name} is not installed")
    assert CompileEngine.unavailable() == "triton is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CompileEngine.unavailable() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = "'compile' .* needs a C\\+\\+ compiler and finds no no-such-compiler: install .* CXX"
    with pytest.raises(EngineUnavailable, match=words):
        engines.pick("compile", "cpu")
