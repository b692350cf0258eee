"""Engines by name: which one runs, in which type, and that they draw the same samples."""

import logging
import math
import os

import pytest
import torch
from cross_section import SLOW, cross_section
from drawing import CLOSE, NFE, draw, tiny
from engine_cases import SMALLEST, TYPES

from ncsn_fast import EngineError, EngineUnavailable, Sampler, SamplingError, engines
from ncsn_fast.engines import base, batch_sizes, precision
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.ops import backends


@pytest.mark.parametrize(
    ("model", "batch_size"), cross_section(["ncsnv2", "ncsn"], [1, 2, 8]), indirect=["model"]
)
def test_batch_sizes_and_engines_agree_to_rounding(model, batch_size):
    expected = draw(Sampler(model, engine="eager", batch_size=3), 4)
    for engine in ("eager", "cpu"):
        other = draw(Sampler(model, engine=engine, dtype="fp32", batch_size=batch_size), 4)
        torch.testing.assert_close(other, expected, **CLOSE)


@pytest.mark.parametrize(
    ("arch", "how"),
    cross_section(["ncsnv2", "ncsn", "ncsnv2_deeper"], ["eager", "direct", "winograd"]),
)
def test_numbers_of_threads_change_nothing(arch, how, monkeypatch):
    """For one type and algorithm, which the cpu engine may choose by the number of threads."""
    settings = {"engine": "eager"}
    if how != "eager":
        settings = {"engine": "cpu", "dtype": SMALLEST, "convolutions": how}
    monkeypatch.setitem(precision.BOUNDS, "bf16", 0.1)  # random weights, not trained ones
    before = torch.get_num_threads()
    model = tiny(arch=arch, ngf=8, n_sigmas=2)
    one, two = (
        draw(Sampler(model, batch_size=4, threads=t, **settings), 3, method="cas") for t in (1, 2)
    )
    if how == "eager" and os.environ.get("ONEDNN_MAX_CPU_ISA") in ("SSE41", "AVX"):
        # Below AVX2 oneDNN's own products are summed by parts, one for each thread.
        torch.testing.assert_close(two, one, **CLOSE)
    else:
        assert torch.equal(two, one)
    assert torch.get_num_threads() == before


def damaged():
    model = tiny()
    with torch.no_grad():
        model.net.end_conv.bias[1] = math.nan
    return model


def test_damaged_weights_stop_the_sampling():
    with pytest.raises(SamplingError, match=r"sample 7 of seed 5 .* at level 0 \(sigma 2\)"):
        draw(Sampler(damaged(), engine="eager"), 2, seed=5, start=7)
    for dtype in TYPES:
        with pytest.raises(EngineError, match=r"own output is not finite .* weights are damaged"):
            draw(Sampler(damaged(), engine="cpu", dtype=dtype))


def test_callers_settings_do_not_reach_the_engine(plain):
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert torch.equal(draw(plain, 2), draw(plain, 2))
        inside = draw(plain, 2)
    assert torch.equal(inside, draw(plain, 2))


@pytest.mark.parametrize("model", ["ncsnv2", pytest.param("ncsn", marks=SLOW)], indirect=["model"])
def test_the_callers_model_is_left_alone(model):
    model.train()
    before = model.digest()
    for engine in ("eager", "cpu"):
        sampler = Sampler(model, engine=engine)
        draw(sampler, 1)
        assert (model.training, model.digest()) == (True, before)
        with torch.no_grad():
            first = sampler.score(torch.zeros(1, *model.image_shape), 1.0)
            model.net.end_conv.weight.mul_(2)
            again = sampler.score(torch.zeros(1, *model.image_shape), 1.0)
            model.net.end_conv.weight.div_(2)
        assert torch.equal(first, again)
    model.eval()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bf16", "bf16"), ("bfloat16", "bf16"), (torch.bfloat16, "bf16"), ("float32", "fp32"),
        (torch.float32, "fp32"),
    ],
)  # fmt: skip
def test_names_of_types(dtype, name):
    assert Sampler(tiny(), engine="cpu", dtype=dtype).dtype == name


def test_engines_of_other_sizes_share_their_weights():
    sampler = Sampler(tiny(), engine="cpu")
    small, large = sampler.engine_for(1), sampler.engine_for(5)
    assert (small.batch_size, large.batch_size) == (1, 5)
    assert small._weights is large._weights
    assert sampler.engine_for(5) is large


def test_engines_of_a_few_sizes_are_kept():
    """The largest, and those used last."""
    sampler = Sampler(tiny(), engine="cpu", dtype="fp32")
    largest = sampler.engine_for(9)
    for n in (1, 2, 3, 2, 4, 5):
        sampler.engine_for(n)
    assert sampler._pool.sizes == [9, 2, 4, 5]
    assert sampler.engine_for(9) is largest
    assert sampler.engine_for(1)._weights is largest._weights


@pytest.mark.parametrize("largest", [1, 2, 7, 64, 256])
def test_micro_batches_are_balanced(largest):
    """As few as with the largest size; less than one image of padding in each."""
    for n in range(1, 600):
        size = batch_sizes.balanced_batch_size(n, largest)
        n_batches = -(-n // largest)
        assert 1 <= size <= largest
        assert -(-n // size) == n_batches
        assert n_batches * (size - 1) < n <= n_batches * size
    assert batch_sizes.balanced_batch_size(0, largest) == 1


@pytest.mark.parametrize(
    ("engine", "options", "sizes"),
    [
        ("eager", {}, [1, 33, 33, 43]),
        ("cpu", {}, [1, 33, 33, 43]),
        ("cuda", {}, [1, 33, 33, 43]),
        ("ort", {}, [1, 33, 33, 43]),
        ("ort", {"graph": "on"}, [1, 64, 64, 64]),
        ("compile", {}, [1, 64, 64, 64]),
        ("trt", {}, [1, 64, 64, 64]),
    ],
)
def test_default_sizes_of_micro_batches(monkeypatch, engine, options, sizes):
    monkeypatch.setattr(base, "largest_batch_size", lambda *_: 64)
    size = engines.ENGINES[engine].default_batch_size
    got = [size(n, (3, 32, 32), torch.device("cpu"), options) for n in (1, 33, 65, 129)]
    assert got == sizes


def test_hardly_more_is_evaluated_than_asked_for(monkeypatch):
    monkeypatch.setattr(base, "largest_batch_size", lambda *_: 4)
    sampler, evaluated = Sampler(tiny(), engine="eager"), []
    network = EagerEngine.network
    monkeypatch.setattr(
        EagerEngine, "network", lambda e, x, k: evaluated.append(len(x)) or network(e, x, k)
    )
    plan = sampler.plan(5)
    assert (plan.batch_size, plan.n_batches) == (3, 2)
    assert plan.flop == network_flop(sampler.model) * NFE * 6
    evaluated.clear()
    images = draw(sampler, 5)
    assert evaluated == [3] * 2 * NFE
    whole = draw(Sampler(sampler.model, engine="eager", batch_size=5), 5)
    torch.testing.assert_close(images, whole, **CLOSE)


def test_the_engine_that_auto_means(caplog):
    with caplog.at_level(logging.INFO):
        assert Sampler(tiny(), device="cpu").engine_class.name == "cpu"
    assert (
        f"engine cpu (our kernels), {CpuEngine.default_dtype(torch.device('cpu'))}, on cpu"
        in caplog.text
    )


@pytest.mark.parametrize("engine", ["cuda", "trt"])
def test_engines_that_cannot_run_here_say_why_and_which_can(engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = f"'{engine}' .* cannot run here: torch sees no NVIDIA GPU .* run here: cpu, eager"
    with pytest.raises(EngineUnavailable, match=words):
        Sampler(tiny(), engine=engine, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "warp"}, "engine must be auto, cuda, cpu, eager, .*; got 'warp'"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"engine": "eager", "dtype": "bf16"}, "'eager' computes in fp32; got dtype 'bf16'"),
        ({"engine": "cpu", "dtype": torch.float16}, "'cpu' computes in bf16 or fp32; got dtype"),
        ({"engine": "cpu", "compile_cache": "x"}, "'cpu' keeps no compiled engines"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Sampler(tiny(), device="cpu", **options)


def test_without_a_gpu_the_engine_for_gpus_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = r"engine 'cuda' .* torch sees no NVIDIA GPU .* a CUDA build of torch.*: cpu, eager"
    with pytest.raises(EngineUnavailable, match=message):
        Sampler(tiny(), engine="cuda")


@pytest.mark.parametrize(
    ("missing", "words"),
    [("cudnn", "has no cuDNN; install"), ("triton", "pip install triton (Linux)")],
)
def test_what_else_the_engine_for_gpus_needs(monkeypatch, missing, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: missing != "cudnn")
    reason = "Triton is not installed: pip install triton (Linux)"
    monkeypatch.setattr(backends, "missing", lambda name: reason if name == missing else "")
    assert words in CudaEngine.unavailable()
    kind, device, reason = engines.pick("auto", None)
    assert (kind.name, device.type) == ("eager", "cuda")
    assert words in reason


def test_settings_of_an_engines_own():
    sampler = Sampler(tiny(), engine="cpu", dtype="fp32", convolutions="winograd")
    assert sampler.engine_for(1).convolutions == "winograd"
    for options in ({"convolutions": "fft"}, {"graph": "level"}, {"bach_size": 3}):
        ((name, value),) = options.items()
        words = rf"'cpu' has no option {name}={value!r}.*; its options: .*: direct, winograd"
        with pytest.raises(ValueError, match=words):
            Sampler(tiny(), engine="cpu", **options)


@pytest.mark.parametrize("gpu", [True, False])
def test_engines_choose_their_device(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * gpu)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: gpu)
    assert engines.pick("cpu", None)[:2] == (CpuEngine, cpu)
    assert engines.pick("auto", "cpu")[:2] == (CpuEngine, cpu)
    assert engines.pick("eager", None)[1] == (cuda if gpu else cpu)
    assert engines.pick("auto", None)[:2] == ((CudaEngine, cuda) if gpu else (CpuEngine, cpu))
    if gpu:
        with pytest.raises(ValueError, match="device 'cuda:2': torch sees 2 GPUs, counted from 0"):
            engines.pick("auto", "cuda:2")
    message = "engine 'cpu' runs on cpu; got device 'cuda'" if gpu else "torch sees no NVIDIA GPU"
    with pytest.raises(ValueError, match=message):
        engines.pick("cpu", "cuda")
    with pytest.raises(ValueError, match="engine 'eager' runs on cpu or cuda; got device 'mps'"):
        engines.pick("eager", "mps")
