"""engine="ort": every network as in eager, the same samples, and no provider but the one meant."""

import importlib.util

import golden
import onnxruntime
import pytest
import tiny
import torch
from drawing import CLOSE, draw
from test_export import ARCHS, model
from test_unet import published

from ncsn_fast import EngineError, EngineUnavailable, Sampler, engines, export_onnx
from ncsn_fast.engines import ort, precision
from ncsn_fast.engines.ort import OrtEngine

CPU = torch.device("cpu")


def engine(of, **settings):
    usual = {"device": CPU, "dtype": "fp32", "batch_size": 3, "threads": 1}
    return OrtEngine(of, **{**usual, **settings})


def relative(f, expected):
    return ((f - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
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
    session = two.engine_for(1)._session
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
    with pytest.raises(ValueError, match="'ort' computes in fp16 or fp32; got dtype 'bf16'"):
        Sampler(tiny.model(), engine="ort", device="cpu", dtype="bf16")


@pytest.mark.parametrize("arch", ["ncsn", "unet_a"])
def test_calls_that_cannot_be(arch):
    built = engine(model(arch))
    with pytest.raises(ValueError, match="runs batches of 3; got 2 images"):
        built.network(torch.rand(2, *built.model.image_shape), None)
    with pytest.raises(ValueError, match=f"conditioned on the {built.model.conditioning}"):
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
    with pytest.raises(ValueError, match="no option graph='step'; its options: onnx: FILE"):
        Sampler(of, graph="step", **settings)
    with pytest.raises(ValueError, match="no option onnx=b'"):  # unverified
        Sampler(of, onnx=path.read_bytes()[:9], **settings)


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    of, other, path = tiny.model(), tiny.model(1), tmp_path / "m.onnx"
    digest = of.digest()
    other.digest = lambda: digest  # a forged name
    export_onnx(other, path)
    with pytest.raises(EngineError, match=r"'ort' in fp32 differs from the reference by \d"):
        engine(of, onnx=path)


@pytest.mark.parametrize("missing", [("onnx",), ("onnxruntime",), ("onnx", "onnxruntime")])
def test_what_is_missing(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else found(name, *a)
    )
    words = f"{' and '.join(missing)} not installed: pip install 'ncsn_fast\\[onnx\\]'"
    with pytest.raises(EngineUnavailable, match=f"'ort' .* cannot run here: {words}"):
        engines.pick("ort", "cpu")


class Pretender:
    """An InferenceSession that silently runs on the CPU."""

    def __init__(self, content, options, providers, enable_fallback):
        assert providers == [("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})]
        assert enable_fallback == 0

    def get_providers(self):
        return ["CPUExecutionProvider"]


def test_silent_fall_back_is_an_error(monkeypatch):
    gpu = torch.device("cuda", 1)
    with pytest.raises(EngineUnavailable, match=r"has no CUDAExecutionProvider; .*onnxruntime-gpu"):
        ort.session(b"", gpu, 1)
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Pretender)
    words = r"CUDAExecutionProvider did not start, so .* took CPUExecutionProvider; .*device='cpu'"
    with pytest.raises(EngineUnavailable, match=words):
        ort.session(b"", gpu, 1)
