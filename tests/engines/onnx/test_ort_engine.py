"""engine="ort": every network as in eager, the same samples, and no provider but the one meant."""

import concurrent.futures
import contextlib
import importlib.util
import threading
from typing import ClassVar

import golden
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from architectures import ARCHS, model
from drawing import CLOSE, draw
from tutorial import published

from ncsn_fast import EngineError, EngineUnavailable, Sampler, engines, export_onnx
from ncsn_fast.engines import precision, reference_check
from ncsn_fast.engines.onnx import engine as ort
from ncsn_fast.engines.onnx.engine import OrtEngine
from ncsn_fast.engines.onnx.model import make_onnx

CPU = torch.device("cpu")


def engine(of, **settings):
    usual = {"device": CPU, "dtype": "fp32", "batch_size": 3, "threads": 1}
    return OrtEngine(of, **{**usual, **settings})


def relative(f, expected):
    return ((f - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("arch", "channels"), [("ncsnv2", 3), *((arch, 1) for arch in ARCHS)])
def test_scores_are_eagers(arch, channels):
    of = model(arch, channels=channels)
    close = 3e-5 if arch.startswith("unet") else 5e-6  # eager's group norm is that far off
    ours, eager = (
        Sampler(of, engine=e, device="cpu", batch_size=2, threads=1) for e in ("ort", "eager")
    )
    for size in (of.config.image_size, (44, 28) if arch.startswith("unet") else (8, 32)):
        x = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0))
        sigma = torch.tensor([5.0, 0.5, 0.02])
        assert relative(ours.score(x, sigma), eager.score(x, sigma)) < close
    assert ours.engine_for(1).error < precision.BOUNDS["fp32"]


@pytest.mark.parametrize(
    ("arch", "method"),
    [("ncsnv2", "ald"), ("ncsn", "cas"), ("unet_a", "heun"), ("ncsnv2", "pc"), ("unet_b", "euler")],
)
def test_samples_are_eagers(arch, method):
    size = {} if arch.startswith("unet") else {"image_size": (8, 8)}
    of = model(arch, **size)
    options = {"steps": 2} if method in ("heun", "euler") else {}
    expected, ours = (
        draw(
            Sampler(of, engine=e, device="cpu", batch_size=2, threads=1),
            3,
            method=method,
            **options,
        )
        for e in ("eager", "ort")
    )
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_golden_scores_of_the_tutorials_network():
    _, arrays = golden.read("tutorial_a_28")
    of, x = published("unet_a"), torch.from_numpy(arrays["x"])
    sampler = Sampler(of, engine="ort", device="cpu", batch_size=2, threads=1)
    sigma = of.clock.std(torch.from_numpy(arrays["cond"]))
    golden.assert_matches(sampler.score(x, sigma), arrays["output"])


def test_padded_batches_threads_and_calls_change_nothing():
    of = tiny.model(channels=3)
    settings = {"engine": "ort", "device": "cpu", "batch_size": 4}
    one = Sampler(of, threads=1, **settings)
    first = draw(one, 6)
    assert torch.equal(draw(one, 6), first)
    assert torch.equal(draw(one, 3), first[:3])
    assert torch.equal(draw(one, 2, start=4), first[4:])
    before = torch.get_num_threads()
    two = Sampler(of, threads=2, **settings)
    assert torch.equal(draw(two, 6), first)
    assert torch.get_num_threads() == before
    session = two.engine_for(1)._session.ort
    assert session.get_session_options().intra_op_num_threads == 2


def test_results_are_the_callers_to_keep():
    of = tiny.model()
    built = engine(of)
    x = torch.rand(3, 1, 8, 8)
    with built.context():
        first = built.network(x, None)
        kept = first.clone()
        built.network(x + 1, None)
    assert torch.equal(first, kept)
    strided = torch.rand(8, 8, 1, 3).permute(3, 2, 0, 1)
    with built.context():
        assert torch.equal(built.network(strided, None), built.network(strided.contiguous(), None))
        assert torch.equal(built.network(x, None), kept)


def test_engines_of_one_model_share_a_session():
    of = tiny.model()
    a, b = engine(of), engine(of, batch_size=1)
    assert a._session is b._session is a.resized(7)._session
    assert a._buffers is not a.resized(7)._buffers
    others = engine(of, dtype="fp16"), engine(of, threads=2), engine(tiny.model(1))
    assert len({id(e._session) for e in (a, *others)}) == 4
    del a, b, others
    assert not [key for key in ort._SESSIONS if key[0] == of.digest()]


def test_later_changes_of_the_model_are_not_seen():
    of = tiny.model()
    built, x = engine(of), torch.rand(3, 1, 8, 8)
    before = built.output(x, None)
    with torch.no_grad():
        of.net.end_conv.weight.mul_(2)
    assert torch.equal(built.output(x, None), before)
    assert not torch.equal(engine(of).output(x, None), before)


def test_half():
    sampler = Sampler(tiny.model(), engine="ort", device="cpu", dtype="fp16", threads=1)
    expected = draw(Sampler(tiny.model(), engine="eager", device="cpu"), 2)
    apart = (draw(sampler, 2) - expected).abs().max()
    assert 0 < apart < 0.05
    assert 1e-6 < sampler.engine_for(2).error < precision.BOUNDS["fp16"]
    assert Sampler(tiny.model(), engine="ort", device="cpu").dtype == "fp32"
    assert OrtEngine.default_dtype(torch.device("cuda")) == "fp16"
    with pytest.raises(ValueError, match="'ort' computes in fp16 or fp32; got dtype 'bf16'"):
        Sampler(tiny.model(), engine="ort", device="cpu", dtype="bf16")


@pytest.mark.parametrize("arch", ["ncsn", "unet_a"])
def test_calls_that_cannot_be(arch):
    built = engine(model(arch))
    with pytest.raises(ValueError, match="runs batches of 3; got 2 images"):
        built.network(torch.rand(2, *built.model.image_shape), None)
    with pytest.raises(ValueError, match=f"conditioned on the .*: pass {built.model.conditioning}"):
        built.network(torch.rand(3, *built.model.image_shape), None)
    with pytest.raises(ValueError, match="got 9x9"):
        built.network(torch.rand(3, 1, 9, 9), None)


def test_own_files(tmp_path):
    of, path = tiny.model(), tmp_path / "m.onnx"
    export_onnx(of, path, batch=4, size=(8, 8))
    settings = {"engine": "ort", "device": "cpu", "batch_size": 4, "threads": 1}
    fixed = Sampler(of, onnx=str(path), **settings)
    torch.testing.assert_close(draw(fixed, 5), draw(Sampler(of, **settings), 5), **CLOSE)
    with pytest.raises(ValueError, match=r"exported for image size 8; got 16\. Export it with"):
        fixed.score(torch.rand(1, 1, 16, 16), 1.0)
    with pytest.raises(ValueError, match="exported for batch_size 4; got 1"):
        Sampler(of, onnx=path, **{**settings, "batch_size": 1}).sample(1, progress=False)
    with pytest.raises(EngineError, match="another model than the one given"):
        draw(Sampler(tiny.model(1), onnx=path, **settings))
    with pytest.raises(EngineError, match="computes in fp32; pass dtype='fp32'"):
        draw(Sampler(of, onnx=path, dtype="fp16", **settings))
    with pytest.raises(ValueError, match=r"no option graph='step'; .*: onnx: FILE; graph: off, on"):
        Sampler(of, graph="step", **settings)
    with pytest.raises(ValueError, match="graph='on' is for CUDA graphs; on a CPU leave it 'off'"):
        draw(Sampler(of, graph="on", **settings))
    with pytest.raises(ValueError, match="no option onnx=b'"):  # unverified
        Sampler(of, onnx=path.read_bytes()[:9], **settings)


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    of, other, path = tiny.model(), tiny.model(1), tmp_path / "m.onnx"
    digest = of.digest()
    other.digest = lambda: digest  # a forged name
    export_onnx(other, path)
    with pytest.raises(EngineError, match=r"does not hold the graph that ncsn_fast .* writes"):
        engine(of, onnx=path)
    content = make_onnx(other)  # bytes are trusted to be the model's, and their numbers are not
    with pytest.raises(EngineError, match=r"'ort' in fp32 differs from the reference by \d"):
        engine(of, onnx=content)


def test_errors_of_onnx_runtime_become_ours():
    """They have no base but Exception, which nobody else catches."""
    with pytest.raises(EngineError, match="ONNX Runtime cannot open this network"):
        ort.open_session(b"no graph", torch.device("cpu"), 1)
    built = engine(tiny.model())
    built.network(x := torch.rand(3, 1, 8, 8), None)
    (buffers,) = built._buffers.values()
    buffers.binding.bind_input("x", "cpu", 0, np.float32, (3, 1, 9, 8), buffers.x.data_ptr())
    with pytest.raises(EngineError, match="ONNX Runtime cannot run this network"):
        built.network(x, None)


@pytest.mark.parametrize("missing", [("onnx",), ("onnxruntime",), ("onnx", "onnxruntime")])
def test_what_is_missing(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else found(name, *a)
    )
    words = f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"
    with pytest.raises(EngineUnavailable, match=f"'ort' .* cannot run here: {words}"):
        engines.pick("ort", "cpu")


GPU, REAL = torch.device("cuda", 1), onnxruntime.InferenceSession


class Stream:
    """A stream that writes down what is queued on it, and waits for."""

    log: ClassVar[list] = []

    def __init__(self, device, handle=7):
        self.device, self.cuda_stream = device, handle

    def wait_stream(self, other):
        self.log.append((self.cuda_stream, "waits for", other.cuda_stream))


class Runtime:
    """An InferenceSession that claims a GPU, computes on the CPU and holds us to the documents.

    That is: fixed shapes, one thread, the same addresses and no computed shapes, where CUDA graphs
    were asked for.
    """

    sessions: ClassVar[list] = []
    claims: ClassVar[dict[str, str]] = {}  # what it says of its options, where that is untrue
    fails: ClassVar[str] = ""

    def __init__(self, content, options, providers, enable_fallback):
        ((self.name, self.options),) = providers
        assert self.name == "CUDAExecutionProvider"
        assert enable_fallback == 0
        assert all(isinstance(value, str) for value in self.options.values())
        self.graph = self.options.get("enable_cuda_graph") == "1"
        if self.fails:
            raise RuntimeError(self.fails)
        proto = onnx.load_from_string(content)
        if self.graph:
            assert not {node.op_type for node in proto.graph.node} & {"Shape", "If", "Loop", "Scan"}
        self.real = REAL(content, options, providers=["CPUExecutionProvider"])
        self.ran, self.addresses = [], set()
        self.sessions.append(self)

    def get_providers(self):
        return [self.name]

    def get_provider_options(self):
        return {self.name: {**self.options, **self.claims}}

    def get_inputs(self):
        return self.real.get_inputs()

    def io_binding(self):
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding, options):
        entry = "disable_synchronize_execution_providers"
        assert options.get_run_config_entry(entry) == "1"
        self.ran.append(threading.get_ident())
        self.addresses.add(tuple(binding.addresses))
        if self.graph:
            assert len(self.addresses) == len(set(self.ran)) == 1
            assert all(isinstance(n, int) for n in self.get_inputs()[0].shape)
        Stream.log.append((int(self.options["user_compute_stream"]), "runs"))
        self.real.run_with_iobinding(binding.real)


class Binding:
    def __init__(self, real):
        self.real, self.addresses = real, []

    def bind_input(self, name, device, index, *rest, how="bind_input"):
        assert (device, index) == ("cuda", 1)
        self.addresses.append((name, rest[-1]))
        getattr(self.real, how)(name, "cpu", 0, *rest)

    def bind_output(self, *arguments):
        self.bind_input(*arguments, how="bind_output")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is none: maps lie in host memory, and ONNX Runtime is a Runtime."""
    zeros, current = torch.zeros, Stream(GPU, 3)
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(reference_check, "check_precision", lambda engine, size: (0.0, size))
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: list(ort.PROVIDERS.values())
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Runtime)
    for of, name, value in (
        (Runtime, "sessions", []), (Runtime, "claims", {}), (Runtime, "fails", ""),
        (Stream, "log", []),
    ):  # fmt: skip
        monkeypatch.setattr(of, name, value)


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
@pytest.mark.parametrize("graph", ["off", "on"])
def test_runs_on_a_stream_without_waiting(graph, arch, gpu, monkeypatch):
    of = model(arch)
    x, level = torch.rand(3, *of.image_shape), of.sigmas[[0, 3, 1]]
    built = engine(of, device=GPU, graph=graph)
    assert built.levels == (3 if graph == "on" else None)  # the check runs the graph itself
    f = built.network(x, level)
    options = {"device_id": "1", "use_tf32": "0", "user_compute_stream": "7"}
    (session,) = Runtime.sessions
    assert session.options == options | ({"enable_cuda_graph": "1"} if graph == "on" else {})
    once = [(7, "waits for", 3), (7, "runs"), (3, "waits for", 7)]
    assert Stream.log == once
    again = built.network(x + 1, level)
    assert Stream.log == 2 * once
    assert len(session.addresses) == 1
    monkeypatch.undo()
    plain = engine(of)
    for ours, images in ((f, x), (again, x + 1)):
        assert relative(ours, plain.network(images, level)) < 5e-6  # other orders of summation


def test_cuda_graphs_serve_one_shape_and_thread(gpu):
    of = tiny.model()
    built, x = engine(of, device=GPU, graph="on"), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        of.net.end_conv.weight.mul_(2)  # is not seen by graphs of later shapes either
    f = built.network(x, None)
    for _ in range(2):
        wide = built.network(torch.cat((x, x), dim=3), None)
        one = built.resized(1)
        assert relative(one.network(x[:1], None), f[:1]) < 1e-6
    assert wide.shape == (3, 1, 8, 16)
    shapes = [tuple(s.get_inputs()[0].shape) for s in Runtime.sessions]
    assert shapes == [(3, 1, 8, 8), (3, 1, 8, 16), (1, 1, 8, 8), (1, 1, 8, 8)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(built.network, x, None).result(), f)
    assert len(Runtime.sessions) == 5
    built.release()
    assert torch.equal(built.network(x, None), f)
    assert len(Runtime.sessions) == 6


def test_graphs_that_cannot_be_captured(gpu, monkeypatch):
    of = tiny.model()
    built = engine(of, device=GPU, graph="on")
    monkeypatch.setattr(Runtime, "fails", "not all nodes are partitioned to the CUDA provider")
    words = r"cannot capture this network in a CUDA graph: not all nodes .*; use graph='off'"
    with pytest.raises(EngineUnavailable, match=words):
        built.network(torch.rand(3, 1, 8, 8), None)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot open this network: not all nodes"):
        engine(of, device=GPU)
    monkeypatch.setattr(Runtime, "fails", "")
    monkeypatch.setattr(Runtime, "claims", {"enable_cuda_graph": "0"})
    with pytest.raises(EngineUnavailable, match=r"did not take the option; .* or use graph='off'"):
        built.network(torch.rand(3, 1, 8, 8), None)
    with pytest.raises(ValueError, match="a graph for each shape; leave onnx= out"):
        engine(of, device=GPU, graph="on", onnx="m.onnx")


def test_silent_fall_back_is_an_error(gpu, monkeypatch):
    monkeypatch.setattr(Runtime, "get_providers", lambda self: ["CPUExecutionProvider"])
    words = r"CUDAExecutionProvider did not start, so .* took CPUExecutionProvider; .*device='cpu'"
    with pytest.raises(EngineUnavailable, match=words):
        engine(tiny.model(), device=GPU)
    monkeypatch.undo()
    with pytest.raises(EngineUnavailable, match=r"has no CUDAExecutionProvider; .*onnxruntime-gpu"):
        ort.open_session(b"", GPU, 1)
