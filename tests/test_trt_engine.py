"""engine="trt" on the doubles of TensorRT 10.16 and 11.4: everything but TensorRT's own kernels."""

import importlib.machinery
import json
import logging
import multiprocessing
import sys
import types

import pytest
import tensorrt_double
import tiny
import torch
from drawing import CLOSE, draw
from test_export import ARCHS, model

import ncsn_fast
from ncsn_fast import EngineError, EngineUnavailable, Sampler, export_trt
from ncsn_fast.cli import UsageError
from ncsn_fast.engines import precision, trt, trt_api
from ncsn_fast.engines.plan_cache import PlanCache, PlanRefused
from ncsn_fast.engines.trt import GATE, TrtEngine

CPU = torch.device("cpu")


def install(monkeypatch, folder, version, **knobs):
    """A machine with TensorRT of a version, whose GPU is the CPU; returns its knobs."""
    module = tensorrt_double.make(version, **knobs)
    module.__dict__["__spec__"] = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setattr(TrtEngine, "device_types", ("cpu",))
    monkeypatch.setattr(trt, "DEFAULT_FAMILY", "cuda")  # the extension, on the CPU
    monkeypatch.setattr(trt_api, "problem", lambda: None)
    return tensorrt_double.behaviour_of(module)


@pytest.fixture(params=tensorrt_double.VERSIONS)
def knobs(request, monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path, request.param)


@pytest.fixture
def builds(monkeypatch):
    """Settings of every build, in order."""
    seen, real = [], trt.build_plan

    def counted(module, onnx, settings, **more):
        seen.append(settings)
        return real(module, onnx, settings, **more)

    monkeypatch.setattr(trt, "build_plan", counted)
    return seen


def engine(of, dtype="fp32", batch_size=2, **options):
    return TrtEngine(of, device=CPU, dtype=dtype, batch_size=batch_size, threads=1, **options)


def plans(folder=None):
    """What the cache holds beside timings."""
    return [entry for entry in PlanCache(folder).entries() if entry.path.suffix == ".plan"]


def sampler(of, batch_size=2, dtype="fp32", **options):
    settings = {"engine": "trt", "batch_size": batch_size, "dtype": dtype, "threads": 1}
    return Sampler(of, **settings, **options)


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
    [("11.4", arch) for arch in ARCHS] + [("10.16", "ncsn"), ("10.16", "unet_a")],
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


@pytest.mark.parametrize("dtype", TrtEngine.dtypes)
@pytest.mark.parametrize("arch", ["ncsnv2", "unet_a"])
def test_types(knobs, builds, arch, dtype):
    size = {} if arch.startswith("unet") else {"image_size": (8, 8)}
    built = engine(model(arch, **size), dtype)
    low = dtype in ("fp16", "bf16")
    assert (1e-5 if low else 0) < built.error < (precision.BOUNDS[dtype] if low else 1e-5)
    assert built.levels == 4
    assert builds[0].tf32 == (dtype == "tf32")
    kinds = {kind for layer in built._network.layers() for kind in layer.types}
    assert (dtype if low else "fp32") in kinds


def test_a_dozen_levels_are_compared(knobs):
    assert engine(tiny.model(n_sigmas=20)).levels == GATE == 12


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


@pytest.mark.parametrize("graph", ["level", "step", "loop", "none"])
def test_graphs_change_nothing(knobs, graph):
    of = tiny.model()
    assert torch.equal(draw(sampler(of, graph=graph), 3), draw(sampler(of), 3))


def test_one_context_for_each_loop_at_fixed_addresses(knobs):
    built = engine(tiny.model())
    plan = built.loop((8, 8)).plan
    draw_twice = [built.output(torch.rand(2, 1, 8, 8), None) for _ in range(2)]
    calls = tensorrt_double.calls_of(plan._context)
    assert len(draw_twice) == 2
    assert len({tuple(sorted(call.addresses.items())) for call in calls}) == 1
    assert calls[-1].addresses == {"x": plan.input.data_ptr(), "f": plan.output.data_ptr()}
    assert all(call.ok and call.shapes["x"] == (2, 1, 8, 8) for call in calls)
    assert built.resized(1).loop((8, 8)).plan._context is not plan._context


def test_one_engine_serves_smaller_batches_and_a_larger_one_is_built(knobs, builds):
    of = tiny.model()
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
    assert str(built.profile) == "2:4:8 images of 8x8:16x16"
    x = torch.rand(4, 1, 16, 8)
    expected = Sampler(of, engine="eager", device="cpu").engine_for(4).output(x, None)
    torch.testing.assert_close(built.output(x, None), expected, rtol=1e-4, atol=1e-5)
    for batch_size, size in ((1, 8), (9, 8), (4, 24)):
        with pytest.raises(ValueError, match=f"not {batch_size} of {size}x{size}; choose that"):
            built.resized(batch_size).output(torch.rand(batch_size, 1, size, size), None)
    assert len(builds) == 1
    with pytest.raises(ValueError, match=r"must include this model's 8x8 and batch_size 2"):
        engine(of, batch="4:4:4")
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
        ({"batch": "4:2:8"}, "least:usual:largest, from 1 upwards; got 4:2:8"),
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


# What can go wrong while it is built.


def test_an_engine_that_computes_something_else_is_not_kept(knobs, builds):
    knobs.output_error = 0.5
    with pytest.raises(EngineError, match=r"'trt' in fp32 differs from the reference by \d"):
        engine(tiny.model())
    assert plans() == []
    knobs.output_error = 0.0
    engine(tiny.model())
    assert len(builds) == 2


def test_another_type_is_tried_where_nobody_asked_for_one(knobs, builds, caplog):
    knobs.output_error = 0.02
    of = tiny.model()
    with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="'trt' in fp32"):
        Sampler(of, engine="trt", batch_size=2).engine_for(2)
    tried = [record.getMessage().split(":")[0] for record in caplog.records]
    assert tried == ["trying bf16", "trying tf32", "trying fp32"]


def test_a_convolution_in_float_is_noticed(knobs):
    knobs.float_convolution = True
    words = r"TensorRT computes \S+ in fp32 instead of fp16; .*engine='cuda'"
    with pytest.raises(EngineError, match=words):
        engine(tiny.model(), "fp16")
    assert plans() == []


def test_a_build_that_fails(knobs):
    knobs.fail_build = True
    with pytest.raises(EngineError, match=r"TensorRT could not build an engine: .+; free GPU"):
        engine(tiny.model())
    knobs.fail_build, knobs.fail_context = False, True
    with pytest.raises(EngineError, match=r"cannot make an execution context: .+; free GPU memory"):
        engine(tiny.model())


def test_a_run_that_fails(knobs):
    built = engine(tiny.model())
    knobs.fail_run = True
    with pytest.raises(EngineError, match=r"TensorRT could not run: .+; .*graph='none'"):
        built.output(torch.rand(2, 1, 8, 8), None)


def test_no_driver(knobs):
    knobs.driver = False
    with pytest.raises(
        EngineUnavailable, match=r"cannot use this machine's GPU \(.*35.*nvidia-smi"
    ):
        engine(tiny.model())


def test_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # import raises ImportError
    with pytest.raises(EngineUnavailable, match=r"tensorrt does not import \(.*pip install"):
        trt_api.load()
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    sys.modules["tensorrt"].__version__ = "8.6.1"
    with pytest.raises(EngineUnavailable, match=r"8\.6\.1 has another .* 'tensorrt>=10.16,<12'"):
        trt_api.load()


def test_versions_that_nobody_tested_say_so(monkeypatch, caplog):
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.9.0"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with caplog.at_level(logging.INFO):
        assert trt_api.load() is module
    assert "tensorrt 10.9.0: tested are 10.16 and 11.4" in caplog.text


def test_without_gpu_and_tensorrt_the_message_names_both(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    read = []
    monkeypatch.setattr(ncsn_fast.sampler, "resolve_model", read.append)
    words = (
        r"engine 'trt' .* cannot run here: torch sees no NVIDIA GPU .*; tensorrt not installed: "
        r"pip install 'tensorrt>=10\.16,<12'\. Engines that run here: .*cpu"
    )
    with pytest.raises(EngineUnavailable, match=words):
        ncsn_fast.Sampler(engine="trt")
    assert not read  # before the model is
    with pytest.raises(EngineUnavailable, match="engine 'trt'"):
        export_trt(tiny.model(), "m.plan")


# What is kept.


def test_the_second_time_it_comes_from_the_cache(knobs, builds, tmp_path):
    of = tiny.model()
    first = engine(of)
    again = engine(of)
    assert (len(builds), first.stored.built, again.stored.built) == (1, True, False)
    assert again.error == first.error
    (entry,) = plans()
    assert entry.path.parent == tmp_path / "cache" / "ncsn_fast" / "engines"
    assert entry.notes["model"] == of.digest()
    other = tmp_path / "other"
    draw(sampler(of, compile_cache=other), 1)
    assert len(builds) == 2
    assert len(plans(other)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"dtype": "tf32"}, {"batch_size": 3}, {"builder_level": 4},
        {"workspace": 1}, {"refit": "on"}, {"size": "8,8:8,8:16,16"}, {"gpu": "another"},
        {"version": "another"},
    ],
)  # fmt: skip
def test_what_an_engine_depends_on(knobs, builds, monkeypatch, change):
    engine(tiny.model())
    change = dict(change)
    seed, machine = change.pop("seed", 0), trt_api.machine
    told = {k: change.pop(k) for k in ("gpu", "version") if k in change}
    monkeypatch.setattr(trt_api, "machine", lambda *args: {**machine(*args), **told})
    engine(tiny.model(seed), **{"dtype": "fp32", **change})
    assert len(builds) == 2


def test_timings_are_kept_for_the_next_build(knobs, monkeypatch):
    given, real = [], trt.build_plan

    def spied(*args, timings, **more):
        given.append(timings)
        return real(*args, timings=timings, **more)

    monkeypatch.setattr(trt, "build_plan", spied)
    engine(tiny.model())
    engine(tiny.model(1))
    assert given[0] is None
    assert len(given[1]) > 0


def test_damage_in_the_cache_is_built_anew(knobs, builds, caplog):
    of = tiny.model()
    engine(of)
    (entry,) = plans()
    content = bytearray(entry.path.read_bytes())
    content[-100] ^= 1
    entry.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert engine(of).stored.built
    assert len(builds) == 2
    assert str(entry.path) in caplog.text


def test_new_weights_are_put_into_an_engine_that_can_be_refitted(knobs, builds):
    first, second = tiny.model(), tiny.model(1)
    a = engine(first, refit="on")
    b = engine(second, refit="on")
    assert len(builds) == 1
    assert builds[0].refit
    x = torch.rand(2, 1, 8, 8)
    for built, of in ((a, first), (b, second)):
        expected = Sampler(of, engine="eager", device="cpu").engine_for(2).output(x, None)
        torch.testing.assert_close(built.output(x, None), expected, rtol=1e-4, atol=1e-5)
    engine(tiny.model(2, ngf=8), refit="on")
    assert len(builds) == 2
    with pytest.raises(EngineError, match=r"TensorRT .*refit.*; build a plan of this model"):
        engine(first)._network.refit(b._onnx())


def _a_rank(folder, version, queue):
    with pytest.MonkeyPatch.context() as patch:
        install(patch, folder, version)
        built = engine(tiny.model())
        queue.put((built.stored.built, built.error))


def test_ranks_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_a_rank, args=(tmp_path, "11.4", queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [queue.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(built for built, _ in found) == [False] * 2 + [True]
    assert len({error for _, error in found}) == 1


# Files.


def test_plan_files(knobs, builds, tmp_path, capsys):
    of, path = tiny.model(), tmp_path / "m.plan"
    written = export_trt(of, path, dtype="fp32", batch="1:2:4", device="cpu")
    assert written.size == path.stat().st_size
    assert "1:2:4 images of 8x8" in str(written)
    assert oct(path.stat().st_mode)[-3:] == "600"
    ours = sampler(of, plan=str(path))
    assert torch.equal(draw(ours, 3), draw(sampler(of, batch="1:2:4"), 3))
    assert len(builds) == 1
    with pytest.raises(PlanRefused, match="model"):
        draw(sampler(tiny.model(1), plan=path), 1)
    with pytest.raises(PlanRefused, match="dtype"):
        draw(sampler(of, plan=path, dtype="tf32"), 1)
    with pytest.raises(ValueError, match=r"takes 1:2:4 images .*, not 8 of 8x8"):
        draw(sampler(of, 8, plan=path), 1)


def test_plan_files_of_others(knobs, tmp_path, monkeypatch):
    of, path = tiny.model(), tmp_path / "m.plan"
    export_trt(of, path, dtype="fp32", device="cpu")
    machine = trt_api.machine
    with monkeypatch.context() as patch:
        patch.setattr(trt_api, "machine", lambda *a: {**machine(*a), "gpu": "NVIDIA L4"})
        with pytest.raises(PlanRefused, match=r"gpu.*NVIDIA L4"):
            draw(sampler(of, plan=path), 1)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody"))
    with pytest.raises(PlanRefused, match=str(path)):
        draw(sampler(of, plan=path), 1)
    with pytest.raises(EngineError, match=r"nothing\.plan: there is no such file; .*--format trt"):
        draw(sampler(of, plan=tmp_path / "nothing.plan"), 1)


def test_plans_of_another_tensorrt_are_refused(monkeypatch, tmp_path):
    of, path = tiny.model(), tmp_path / "m.plan"
    install(monkeypatch, tmp_path, "10.16")
    export_trt(of, path, dtype="fp32", device="cpu")
    install(monkeypatch, tmp_path, "11.4")
    with pytest.raises(PlanRefused, match=r"tensorrt.*11\.4.*10\.16|tensorrt.*10\.16.*11\.4"):
        draw(sampler(of, plan=path), 1)
    monkeypatch.setattr(trt_api, "machine", lambda *args: {"tensorrt": "any"})  # nobody looked
    other = engine(of)
    older = tensorrt_double.make("10.16")
    with pytest.raises(EngineError, match=r"TensorRT refuses this plan: .*; clear the cache"):
        trt.TrtNetwork(older, other.stored.content)


def test_the_command(knobs, tmp_path, capsys, monkeypatch):
    from ncsn_fast import export

    monkeypatch.setattr(ncsn_fast.trt_export, "resolve_model", lambda _: tiny.model())
    out = str(tmp_path / "m.plan")
    words = ["--format", "trt", "--out", out, "--batch", "1:2:4", "--dtype", "bf16"]
    assert export.main([*words, "--builder-level", "1", "--workspace", "2", "--refit"]) == 0
    assert "TensorRT engine, bf16" in capsys.readouterr().out
    facts = json.loads(json.dumps(plans()[0].facts))
    assert (facts["level"], facts["workspace"], facts["refit"]) == (1, 2 * 10**9, True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--format", "trt", "--opset", "20"], "--opset is for --format onnx"),
        (["--format", "trt", "--batch", "4:2:1:0"], "batch must be"),
        (["--format", "trt", "--size", "8"], "size must be H,W"),
        (["--workspace", "4"], "--workspace is for --format trt"),
        (["--builder-level", "4"], "--builder-level is for --format trt"),
        (["--refit"], "--refit is for --format trt"),
        (["--dtype", "tf32"], "--dtype tf32 is for --format trt"),
    ],
)
def test_usage_errors(words, reason, tmp_path):
    from ncsn_fast import export

    with pytest.raises(UsageError, match=reason):
        export.main(["--out", str(tmp_path / "m"), *words])


# What it says.


def test_what_it_describes(knobs):
    of = tiny.model()
    built = engine(of, "fp16")
    text = built.describe()
    assert text.startswith(f"TensorRT {trt_api.load().__version__}, fp16, 1:2 images of 8x8; plan")
    assert text.count("\n") == len(built._network.layers()) > 10
    assert built.memory() > built._network.memory > 0
    assert sampler(of).plan(4).engine == "trt"


def test_layers_without_details_leave_a_warning(knobs, caplog, monkeypatch):
    layers = trt.TrtNetwork.layers
    monkeypatch.setattr(
        trt.TrtNetwork, "layers", lambda self: [trt_layer(x.name) for x in layers(self)]
    )
    with caplog.at_level(logging.WARNING):
        engine(tiny.model())
    assert "inspector shows no convolution" in caplog.text


def trt_layer(name):
    from ncsn_fast.engines.trt_runtime import _layer

    return _layer(name)
