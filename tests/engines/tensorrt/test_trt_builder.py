"""Plans by a real builder: that of TensorRT for RTX, which is TensorRT 11's and needs no GPU.

It cannot run them without one. What it shows: that our ONNX parses, that profiles, types and
settings are taken, and how failures look.
"""

import os
import signal
import warnings

import own_networks
import pytest
from architectures import ARCHS, model
from cross_section import SLOW, cross_section

from ncsn_fast import EngineError, EngineUnavailable
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.engines.tensorrt.builder import Profile, Settings, build_plan
from ncsn_fast.engines.tensorrt.runtime import TrtNetwork

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="no wheel for this platform")


@pytest.fixture(autouse=True)
def _quiet():
    """Timings are deprecated there, and do nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Tt]iming cache.*", DeprecationWarning)
        yield


def for_a_gpu_that_is_not_here(config):
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)


def profile(of, batch=(1, 2, 4), largest=1):
    h, w = of.config.image_size
    return Profile(batch, ((h, w), (h, w), (largest * h, largest * w)))


def build(of, shapes=None, dtype="fp32", adjust=for_a_gpu_that_is_not_here, **settings):
    shapes = shapes or profile(of)
    content = make_onnx(of, dtype=dtype, batch=shapes.fixed_batch, size=shapes.fixed_size)
    return build_plan(tensorrt_rtx, content, Settings(shapes, **settings), adjust=adjust)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), cross_section(ARCHS, ["fp32", "fp16", "bf16"]))
def test_every_network_in_every_type(arch, dtype):
    of = model(arch)
    built = build(of, dtype=dtype, level=0)
    stored = sum(p.nbytes for p in of.parameters())
    assert len(built.plan) > stored / (1 if dtype == "fp32" else 2.5)
    assert built.seconds > 0


@pytest.mark.parametrize(
    "name",
    [
        "unet",
        "signals",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("edm", "diffusers", "classes")),
    ],
)
def test_networks_that_users_bring(name):
    of = own_networks.model(name)
    for dtype in ("fp32", "fp16"):
        assert build(of, dtype=dtype, level=0).plan


@pytest.mark.parametrize(
    "arch", ["unet_a", *(pytest.param(a, marks=SLOW) for a in ("ncsnv2", "unet_b"))]
)
def test_sizes_may_stay_open(arch):
    of = model(arch)
    open_size, fixed = build(of, profile(of, largest=2)).plan, build(of, profile(of)).plan
    assert len(open_size) > len(fixed)


def test_settings_reach_the_builder():
    seen = []

    def look(config):
        for_a_gpu_that_is_not_here(config)
        flag, pool = tensorrt_rtx.BuilderFlag, tensorrt_rtx.MemoryPoolType
        seen.append(
            (
                config.get_flag(flag.TF32),
                config.builder_optimization_level,
                config.get_memory_pool_limit(pool.WORKSPACE),
                config.num_optimization_profiles,
                config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.DETAILED,
            )
        )

    of = model()
    build(of, adjust=look, tf32=True, level=1, workspace=2**28)
    build(of, profile(of, (2, 2, 2)), adjust=look, level=5)
    first, second = seen
    assert first == (True, 1, 2**28, 1, True)
    assert second[:2] == (False, 5)  # TF32 is on where nobody says
    assert second[2] > 2**33
    assert second[3:] == (0, True)  # nothing is open, so there is nothing to say


def test_refit_needs_a_gpu_here():
    with pytest.raises(EngineError, match=r"could not build an engine: .*; free GPU memory"):
        build(model(), refit=True)


def test_without_a_driver_the_gpu_at_hand_cannot_be_built_for():
    def at_hand(config):
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(tensorrt_rtx.ComputeCapability.CURRENT, 0)

    with pytest.raises(EngineError, match=r"could not build .*[Cc]uda.* 35"):
        build(model(), adjust=at_hand)


def test_a_plan_needs_a_gpu_to_run():
    plan = build(model()).plan
    with pytest.raises(EngineError, match=r"refuses this plan: .*[Cc]uda.* 35.*cache clear"):
        TrtNetwork(tensorrt_rtx, plan)


def test_what_is_no_network():
    of = model()
    for content in (b"", b"no protobuf", make_onnx(of)[:-999]):
        with pytest.raises(EngineError, match=r"does not take this network: .+; use engine='cuda'"):
            build_plan(tensorrt_rtx, content, Settings(profile(of)))


def test_profiles_that_contradict_the_network():
    content = make_onnx(model(), size=(16, 24))
    other = Profile((1, 2, 4), ((32, 32),) * 3)
    with pytest.raises(EngineError, match=r"could not build|does not take the profile"):
        build_plan(tensorrt_rtx, content, Settings(other), adjust=for_a_gpu_that_is_not_here)


def test_ctrl_c_stops_the_builder():
    """A real signal in the middle of a real build."""

    def interrupt(config):
        for_a_gpu_that_is_not_here(config)
        signal.setitimer(signal.ITIMER_REAL, 0.3)

    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            build(model("ncsn_deeper"), adjust=interrupt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_driver_that_gives_no_builder(monkeypatch):
    def refuse(log):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt_rtx, "Builder", refuse)
    with pytest.raises(EngineUnavailable, match=r"cannot use this machine's GPU .* nvidia-smi"):
        build(model())


@pytest.mark.parametrize(
    ("batch", "size", "words"),
    [
        ((2, 1, 4), ((8, 8),) * 3, "batch must be least:usual:largest, from 1 upwards; got 2:1:4"),
        ((0, 1, 4), ((8, 8),) * 3, "got 0:1:4"),
        ((1, 1, 1), ((8, 8), (16, 4), (16, 16)), "width .* got 8:4:16"),
    ],
)
def test_profiles_that_are_none(batch, size, words):
    with pytest.raises(ValueError, match=words):
        Profile(batch, size)


def test_what_a_profile_holds():
    shapes = Profile((2, 4, 8), ((16, 8), (32, 8), (64, 8)))
    assert [shapes.holds(n, (32, 8)) for n in (1, 2, 8, 9)] == [False, True, True, False]
    assert not shapes.holds(4, (32, 16))
    assert (shapes.fixed_batch, shapes.fixed_size) == (None, None)
    assert shapes.shapes("x", 3) == [(2, 3, 16, 8), (4, 3, 32, 8), (8, 3, 64, 8)]
    assert shapes.shapes("level", 3) == [(2,), (4,), (8,)]
    assert str(shapes) == "2:4:8 images of 16x8:32x8:64x8"
