"""engine="trt" on the doubles of TensorRT 10.16 and 11.4: everything but TensorRT's own kernels."""

import logging

import own_networks
import pytest
import tensorrt_double
import tiny
import torch
from architectures import ARCHS, model
from cross_section import cross_section
from drawing import CLOSE, draw
from trt_cases import engine, sampler

import ncsn_fast
from ncsn_fast import EngineError, Sampler
from ncsn_fast.engines import precision
from ncsn_fast.engines.cuda.graphs import Graphs
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt import builder as trt_builder
from ncsn_fast.engines.tensorrt import engine as trt
from ncsn_fast.engines.tensorrt.engine import CHECK_LEVELS, TrtEngine
from ncsn_fast.engines.tensorrt.runtime import Layer


def test_the_call_of_the_first_page(knobs):
    """ncsn_fast.Sampler(engine="trt").sample(n=256), word for word."""
    of = tiny.model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ncsn_fast.sampler, "resolve_model", lambda _: of)
        images = ncsn_fast.Sampler(engine="trt").sample(n=256)
        expected = Sampler(of, engine="ort", device="cpu", dtype="fp16").sample(n=256)
    assert images.shape == (256, 1, 8, 8)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("knobs", "arch"),
    cross_section(
        ["11.4", "10.16"],
        ARCHS,
        where=lambda version, arch: version == "11.4" or arch in ("ncsn", "unet_a"),
    ),
    indirect=["knobs"],
)
def test_every_network_and_sampler_as_in_eager(knobs, arch):
    size = {} if arch.startswith("unet") else {"image_size": (8, 8)}
    of = model(arch, channels=3, **size)
    steps = {"steps": 2} if arch.startswith("unet") else {}
    for method in ("cas", "heun") if steps else ("ald", "fast"):
        options = steps if method == "heun" else {}
        ours, expected = (
            draw(
                Sampler(of, engine=e, batch_size=2, threads=1, **dtype), 3, method=method, **options
            )
            for e, dtype in (("trt", {"dtype": "fp32"}), ("eager", {"device": "cpu"}))
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("arch", "dtype"), cross_section(["ncsnv2", "unet_a"], TrtEngine.dtypes))
def test_types(knobs, builds, arch, dtype):
    size = {} if arch.startswith("unet") else {"image_size": (8, 8)}
    built = engine(model(arch, **size), dtype)
    low = dtype in ("fp16", "bf16")
    assert (1e-5 if low else 0) < built.error < (precision.BOUNDS[dtype] if low else 1e-5)
    assert built.levels == 4
    assert builds[0].tf32 == (dtype == "tf32")
    kinds = {layer.dtype for layer in built._network.layers()}
    assert (dtype if low else "fp32") in kinds


def test_a_dozen_levels_are_compared(knobs):
    assert engine(tiny.model(n_sigmas=20)).levels == CHECK_LEVELS == 12


def test_fp16_is_what_nobody_asked_for(knobs):
    built = Sampler(tiny.model(), engine="trt")
    assert built.dtype == "fp16"
    draw(built, 1)
    assert built.dtype == "fp16"


def test_procedures_guides_and_known_pixels(knobs):
    of = tiny.model(channels=3)
    ours, expected = sampler(of), Sampler(of, engine="eager", device="cpu", batch_size=2, threads=1)
    for method in ("pc", "adaptive"):
        options = {"rtol": 0.5, "atol": 0.5} if method == "adaptive" else {}
        torch.testing.assert_close(
            draw(ours, 3, method=method, **options),
            draw(expected, 3, method=method, **options),
            **CLOSE,
        )
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    a, b = (s.inpaint(images, mask, progress=False) for s in (ours, expected))
    torch.testing.assert_close(a, b, **CLOSE)
    assert torch.equal(a[:, :, :4], images[:, :, :4])
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.score(x, 0.3), expected.score(x, 0.3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"batch": "1:3:3"}], ids=["any batch", "at most 3"])
def test_labels_and_guidance(knobs, options):
    """Labels are an input of the plan; both halves of guidance in one batch, or one by one."""
    of = own_networks.model("classes")
    ours = sampler(of, batch_size=3, **options)
    expected = Sampler(of, engine="eager", device="cpu", batch_size=3, threads=1)
    for call in ({"labels": [0, 1, 2]}, {}, {"labels": [2, 2, 0], "guidance": 1.5}):
        for method in ("fast", "pc"):
            a, b = (draw(s, 3, method=method, **call) for s in (ours, expected))
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    assert ours.engine_for(3).profile.shapes("labels", 1)[0] == (1,)
    with pytest.raises(ValueError, match="takes images of 8x8 only; leave size= out"):
        engine(of, size="8,8:8,8:16,16")


@pytest.mark.parametrize("graph", ["level", "step", "loop", "none"])
def test_graphs_change_nothing(knobs, graph):
    of = tiny.model()
    assert torch.equal(draw(sampler(of, graph=graph), 3), draw(sampler(of), 3))


def test_network_and_update_are_one_graph_of_a_level(knobs, monkeypatch):
    """As on a GPU, but for the capture: one warm-up, then replays at the same addresses."""
    captures = []

    def capture(self, calls, step, warm_up):
        warm_up()
        captures.append(calls)
        return lambda: [step() for _ in range(calls)]

    of = tiny.model()
    expected = draw(sampler(of), 4)
    monkeypatch.setattr(Graphs, "_capture", capture)
    ours = sampler(of)
    assert torch.equal(draw(ours, 4), expected)
    # The network by itself (the check of its precision), the rows of any level, and the one that
    # denoises; for all calls.
    assert captures == [1, 2, 1]
    calls = tensorrt_double.calls_of(ours.engine_for(4).loop((8, 8)).plan.context)
    assert len(calls) == 2 * 9 + 2  # evaluations of two micro-batches, two warm-ups
    assert len({tuple(call.addresses.items()) for call in calls}) == 1


def test_one_context_for_each_loop_at_fixed_addresses(knobs):
    built = engine(tiny.model())
    plan = built.loop((8, 8)).plan
    draw_twice = [built.output(torch.rand(2, 1, 8, 8), None) for _ in range(2)]
    calls = tensorrt_double.calls_of(plan.context)
    assert len(draw_twice) == 2
    assert len({tuple(sorted(call.addresses.items())) for call in calls}) == 1
    assert calls[-1].addresses == {"x": plan.input.data_ptr(), "f": plan.output.data_ptr()}
    assert all(call.ok and call.shapes["x"] == (2, 1, 8, 8) for call in calls)
    assert built.resized(1).loop((8, 8)).plan.context is not plan.context


def test_one_engine_serves_other_batches_and_beyond_its_largest_one_is_built(
    knobs, builds, monkeypatch
):
    of = tiny.model()
    assert engine(of, batch_size=4).profile.batch == (1, 4, 256)
    builds.clear()
    monkeypatch.setattr(trt, "largest_batch_size", lambda *_: 2)
    four = engine(of, batch_size=4)
    assert four.profile.batch == (1, 4, 4)
    assert four.resized(1)._network is four.resized(3)._network is four._network
    assert len(builds) == 1
    eight = four.resized(8)
    assert eight.profile.batch == (1, 8, 8)
    assert len(builds) == 2
    x = torch.rand(8, 1, 8, 8)
    torch.testing.assert_close(eight.output(x, None), four.output(x, None), rtol=1e-4, atol=1e-5)


def test_profiles_of_the_users_own(knobs, builds):
    of = tiny.model()
    built = engine(of, batch="2:4:8", size="8,8:8,8:16,16", batch_size=4)
    assert str(built.profile) == "2:4:8 images of 8x8:8x8:16x16"
    x = torch.rand(4, 1, 16, 8)
    expected = Sampler(of, engine="eager", device="cpu").engine_for(4).output(x, None)
    torch.testing.assert_close(built.output(x, None), expected, rtol=1e-4, atol=1e-5)
    for batch_size, size in ((1, 8), (9, 8), (4, 24)):
        with pytest.raises(ValueError, match=f"not {batch_size} of {size}x{size}; choose that"):
            built.resized(batch_size).output(torch.rand(batch_size, 1, size, size), None)
    assert len(builds) == 1
    assert engine(of, batch="4:4:4").batch_size == 4
    with pytest.raises(ValueError, match=r"must include this model's 8x8"):
        engine(of, size="16,16")


def test_the_builder_is_told(knobs, builds):
    engine(tiny.model(), builder_level="5", workspace="0.5", dtype="tf32")
    (settings,) = builds
    assert (settings.level, settings.workspace, settings.tf32) == (5, 500_000_000, True)
    knobs.needs_workspace = 10**9
    with pytest.raises(EngineError, match=r"could not build .*; .*larger workspace"):
        engine(tiny.model(1), workspace=0.5)
    assert engine(tiny.model(1), workspace="2").error < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": "a"}, "batch must be a number of images, or least:usual:largest; got 'a'"),
        ({"batch": "0"}, "batch must be"),
        ({"batch": "4:2:8"}, "batch must be a number .*, or least:usual:largest; got '4:2:8'"),
        ({"size": "8,8:8,9:9,8"}, "size must be H,W, or least:usual:largest of those; got '8,8:8"),
        ({"size": "8"}, "size must be H,W, or least:usual:largest of those; got '8'"),
        ({"workspace": "much"}, "workspace must be a number of GB; got 'much'"),
        ({"workspace": "-1"}, "workspace must be a number of GB"),
        ({"builder_level": 6}, "no option builder_level='6'"),
        ({"refit": "maybe"}, "no option refit='maybe'; its options: .*refit: off, on"),
        ({"tune": "on"}, "no option tune='on'"),
    ],
)
def test_options_that_mean_nothing(knobs, builds, options, words):
    with pytest.raises(ValueError, match=words):
        sampler(tiny.model(), **options).engine_for(2)
    assert not builds


def test_what_it_describes(knobs):
    of = tiny.model()
    built = engine(of, "fp16")
    text = built.describe()
    assert text.startswith(
        f"TensorRT {trt_api.load().__version__}, fp16, 1:2:256 images of 8x8; plan"
    )
    assert text.count("\n") == len(built._network.layers()) > 10
    assert built.memory() > built._network.weight_bytes > 0
    assert sampler(of).plan(4).engine == "trt"


def test_layers_without_details_leave_a_warning(knobs, caplog, monkeypatch):
    layers = trt.TrtNetwork.layers
    monkeypatch.setattr(
        trt.TrtNetwork,
        "layers",
        lambda self, context: [Layer(x.name, "", (), None) for x in layers(self)],
    )
    with caplog.at_level(logging.WARNING):
        engine(tiny.model())
    assert "tells the types of 0 of 0 convolutions" in caplog.text


@pytest.mark.parametrize("first", [2, 8])
def test_a_sampler_builds_once_whatever_its_first_call_is(knobs, builds, first):
    ours = Sampler(tiny.model(), engine="trt", dtype="fp32", threads=1)
    for n in (first, 8, 4, 1):
        assert len(draw(ours, n)) == n
        assert ours.report.batch_size == n
    assert [settings.profile.batch for settings in builds] == [(1, 256, 256)]


def test_micro_batches_keep_to_the_shapes_that_were_asked_for(knobs, builds):
    of = tiny.model()
    expected = draw(sampler(of, 4), 9)
    ours = Sampler(of, engine="trt", dtype="fp32", threads=1, batch="2:2:4")
    torch.testing.assert_close(draw(ours, 9), expected, **CLOSE)
    assert ours.engine_for(9).batch_size == ours.micro_batch(9) == 4
    assert draw(ours, 1).shape == (1, 1, 8, 8)
    assert ours.engine_for(1).batch_size == 2
    assert len(builds) == 2
    with pytest.raises(ValueError, match="have 4 images at the nearest; got batch_size 8"):
        draw(sampler(of, 8, batch="2:2:4"), 1)


def test_memory_follows_the_shapes(knobs):
    built = engine(tiny.model(), batch_size=8)
    of_one, of_eight = (e.loop((8, 8)).plan.map_bytes for e in (built.resized(1), built))
    assert of_eight > 5 * of_one
    assert of_eight < built._network.memory


def test_every_size_of_a_profile_is_compared(knobs, monkeypatch):
    seen, real = [], precision.check_precision

    def check(probe, reference, n):
        seen.append((probe.model.config.image_size, probe.batch_size, n))
        return real(probe, reference, n)

    monkeypatch.setattr(precision, "check_precision", check)
    engine(tiny.model(), batch_size=16, size="8,8:8,16:16,16")
    assert sorted(seen) == [((8, 8), 4, 4), ((8, 16), 3, 3), ((16, 16), 3, 3)]


def test_quiet_builds_have_no_bars(knobs, monkeypatch):
    disabled, real = [], trt_builder.tqdm

    def bar(*args, disable, **more):
        disabled.append(disable)
        return real(*args, disable=disable, **more)

    monkeypatch.setattr(trt_builder, "tqdm", bar)
    of = tiny.model()
    draw(sampler(of), 1)  # without progress
    assert set(disabled) == {True}
    disabled.clear()
    sampler(of, builder_level=2).sample(1)
    assert None in disabled  # shown on terminals
