"""engine="trt" on a GPU with TensorRT: what its double cannot show."""

import importlib.util

import pytest
import torch
from engine_cases import LEVELS, chains_of, model, program_of

from ncsn_fast import ModelConfig, Sampler, ScoreModel
from ncsn_fast.engines import precision
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.tensorrt.engine import TrtEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, CUDA's torch"),
    pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="needs TensorRT"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def engine(of, dtype="fp16", batch_size=2, kind=TrtEngine, **options):
    return kind(of, device=CUDA, dtype=dtype, batch_size=batch_size, **options)


@pytest.mark.parametrize("dtype", TrtEngine.dtypes)
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsnv2_deepest", "ncsn"])
def test_networks_are_within_their_bounds(arch, dtype):
    torch.manual_seed(0)
    of = ScoreModel(ModelConfig(arch=arch, image_size=(32, 32), ngf=64, n_sigmas=LEVELS))
    if (arch, dtype) == ("ncsn", "bf16"):
        dtype = "fp16"  # random weights of the 2019 network are beyond bfloat16
    assert 0 < engine(of, dtype).error <= precision.BOUNDS[dtype]


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_graphs_have_the_bits_of_plain_calls(arch):
    of = model(arch)
    program = program_of(of)
    plain = engine(of, graph="none")
    expected = plain.run(program, chains_of(of, device=CUDA)).clone()
    assert torch.isfinite(expected).all()
    for graph in ("step", "level", "loop"):
        built = engine(of, graph=graph)
        assert not built.origin.built
        for _ in range(2):  # the second run replays what the first captured
            assert torch.equal(built.run(program, chains_of(of, device=CUDA)), expected)


def test_the_reference_draws_the_same_samples():
    of = model()
    program = program_of(of)
    expected = engine(of, "fp32", kind=EagerEngine).run(program, chains_of(of, device=CUDA))
    x = engine(of, "fp32").run(program, chains_of(of, device=CUDA))
    torch.testing.assert_close(x, expected, rtol=0.0, atol=2e-3)


def test_streams_other_than_the_default_one():
    of = model()
    built, x = engine(of), torch.rand(2, *of.image_shape, device=CUDA)
    expected = built.output(x, None)
    with torch.cuda.stream(torch.cuda.Stream(CUDA)):
        assert torch.equal(built.output(x, None), expected)


def test_contexts_of_two_sizes_and_single_calls_between_levels():
    of = model()
    program, built = program_of(of), engine(of, batch_size=4)
    small = built.resized(2)
    expected = small.run(program, chains_of(of, device=CUDA)).clone()
    x = torch.rand(4, *of.image_shape, device=CUDA)
    f = built.output(x, None)
    for _ in range(2):
        assert torch.equal(small.run(program, chains_of(of, device=CUDA)), expected)
        assert torch.equal(built.output(x, None), f)
        small.output(x[:2], None)
    assert built.loop((16, 16)).plan.map_bytes > small.loop((16, 16)).plan.map_bytes


def test_a_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    of = model()
    built = TrtEngine(of, device=torch.device("cuda", 1), dtype="fp16", batch_size=2)
    assert built.loop((16, 16)).plan.output.device.index == 1
    assert 0 < built.error <= precision.BOUNDS["fp16"]


def test_new_weights_without_a_build():
    first, second = model(), model()
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(0.9)
    engine(first, refit="on")
    refitted = engine(second, refit="on")
    assert not refitted.origin.built
    assert 0 < refitted.error <= precision.BOUNDS["fp16"]


def test_sizes_and_batches_of_a_profile():
    of = model()
    built = engine(of, batch="1:2:4", size="16,16:16,16:32,32")
    for n, size in ((1, 16), (4, 32)):
        x = torch.rand(n, of.config.channels, size, size)
        f, expected = (
            e.resized(n).output(x, None) for e in (built, engine(of, "fp32", kind=EagerEngine))
        )
        assert (f - expected).norm() <= precision.BOUNDS["fp16"] * expected.norm()


def test_the_call_of_the_first_page():
    images = Sampler(engine="trt").sample(n=256, method="fast", progress=False)
    assert images.shape == (256, 1, 16, 16)
    assert 0.05 < images.mean() < 0.6
