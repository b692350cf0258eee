"""TensorRT's engines that are kept: in the cache, with other weights, and as files."""

import json
import logging
import multiprocessing
import types
from concurrent.futures import ProcessPoolExecutor

import pytest
import tensorrt_double
import tiny
import torch
from drawing import draw
from trt_cases import engine, install, plans, sampler

import ncsn_fast.exporters.tensorrt
from ncsn_fast import EngineError, Sampler, export, export_trt
from ncsn_fast.cli.command import UsageError
from ncsn_fast.engines.onnx import model as onnx_model
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt import engine as trt
from ncsn_fast.engines.tensorrt import facts as trt_facts
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache, PlanRefused, write_plan


def test_the_second_time_it_comes_from_the_cache(knobs, builds, tmp_path):
    of = tiny.model()
    first = engine(of)
    again = engine(of)
    assert (len(builds), first.origin.built, again.origin.built) == (1, True, False)
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


def test_what_a_machine_is(monkeypatch, tmp_path):
    """Each fact of a GPU, so that none is forgotten: another one is another plan."""
    properties = {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132}
    driver = tmp_path / "version"
    driver.write_text("NVRM version: 580.65\nGCC version: 12\n")
    monkeypatch.setattr(trt_api, "_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    module = types.ModuleType("tensorrt")
    module.__version__ = "11.4.0"

    def machine(**other):
        found = types.SimpleNamespace(**(properties | other))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        return trt_api.machine(module, torch.device("cuda", 1))

    first = machine()
    assert first == {
        "tensorrt": "11.4.0", "cuda": "13.0", "driver": "NVRM version: 580.65",
        "gpu": "NVIDIA H100", "capability": "9.0", "multiprocessors": 132,
    }  # fmt: skip
    for change in ({"name": "x"}, {"major": 8}, {"minor": 6}, {"multi_processor_count": 114}):
        assert machine(**change) != first
    driver.unlink()
    assert machine()["driver"] == "unknown"


def test_everything_else_an_engine_depends_on(knobs, builds, monkeypatch):
    engine(tiny.model())
    for name, value in (("package_version", "9.9"), ("kernels_digest", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(trt_facts, name, lambda *_, value=value: value)
            assert engine(tiny.model()).origin.built
    monkeypatch.setattr(onnx_model, "package_version", lambda name: "of another day")
    assert not engine(tiny.model()).origin.built  # who wrote it with what is no part of a graph
    assert len(builds) == 3


def test_timings_are_kept_for_the_next_build(knobs, monkeypatch):
    given, real = [], trt.build_plan

    def spied(*args, timings, **more):
        given.append(timings)
        return real(*args, timings=timings, **more)

    monkeypatch.setattr(trt, "build_plan", spied)
    engine(tiny.model())
    engine(tiny.model(arch="ncsn"))
    timings = PlanCache().get("timings", trt_api.machine(trt_api.load(), torch.device("cpu")))
    assert given[0] is None
    assert len(timings) > len(given[1]) > 0  # the second build went on from the first's


def test_timings_of_another_gpu_are_replaced(knobs, caplog):
    engine(tiny.model())
    knobs.gpu = "NVIDIA L4"
    with caplog.at_level(logging.INFO):
        engine(tiny.model(1))
        engine(tiny.model(2))
    assert caplog.text.count("did not take the timings of an earlier build") == 1


def test_damage_in_the_cache_is_built_anew(knobs, builds, caplog):
    of = tiny.model()
    engine(of)
    (entry,) = plans()
    content = bytearray(entry.path.read_bytes())
    content[-100] ^= 1
    entry.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert engine(of).origin.built
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


def _a_rank(folder, version):
    with pytest.MonkeyPatch.context() as patch:
        install(patch, folder, version)
        built = engine(tiny.model())
        return built.origin.built, built.error


@pytest.mark.slow
def test_ranks_build_once(tmp_path):
    """Eight of them: tests/engines/tensorrt/test_plan_cache.py, without engines."""
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as ranks:
        found = list(ranks.map(_a_rank, [tmp_path] * 3, ["11.4"] * 3))
    assert sorted(built for built, _ in found) == [False, False, True]
    assert len({error for _, error in found}) == 1


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
    with pytest.raises(ValueError, match="have 4 images at the nearest; got batch_size 8"):
        draw(sampler(of, 8, plan=path), 1)


def test_plan_files_bring_type_shapes_and_settings(knobs, builds, tmp_path, monkeypatch):
    of, path = tiny.model(), tmp_path / "m.plan"
    export_trt(of, path, dtype="bf16", batch="1:2:4", builder_level=1, refit=True, device="cpu")
    ours = Sampler(of, engine="trt", plan=path)
    assert len(draw(ours, 9)) == 9
    built = ours.engine_for(9)
    assert (ours.dtype, built.batch_size, built.settings) == ("bf16", 4, builds[0])
    assert len(builds) == 1
    for name, value in (("builder_level", 5), ("refit", "on"), ("batch", "1:2:4"), ("size", "8,8"),
                        ("workspace", 1)):  # fmt: skip
        with pytest.raises(ValueError, match=f"plan= brings its own {name}; leave that out"):
            Sampler(of, engine="trt", plan=path, **{name: value})
    reads, real = [], trt_facts.read_plan
    monkeypatch.setattr(trt_facts, "read_plan", lambda p: reads.append(p) or real(p))
    engine(of, "bf16", plan=path)
    assert reads == [path]  # what was checked is what is loaded


def test_plan_files_of_refitted_engines_hold_their_own_weights(knobs, builds, tmp_path):
    first, second, path = tiny.model(), tiny.model(1), tmp_path / "m.plan"
    engine(first, refit="on", batch="2")
    export_trt(second, path, dtype="fp32", batch="2", refit=True, device="cpu")
    assert len(builds) == 1
    found, _ = trt_facts.read_file(path)
    assert found.notes["model"] == second.digest()
    assert engine(second, plan=path).error < 1e-5
    assert engine(first, plan=path).error < 1e-5  # still open to others' weights
    assert len(builds) == 1


def test_other_sealed_files_are_no_plans(knobs, tmp_path):
    engine(tiny.model())
    (timings,) = (tmp_path / "cache" / "ncsn_fast" / "engines").glob("*.blob")
    with pytest.raises(PlanRefused, match="is no TensorRT engine; write it with"):
        engine(tiny.model(), plan=timings)
    other = tmp_path / "other.plan"
    for facts in ({}, {"size": 8, "batch": 8}, {"size": [[8, 8]] * 3, "batch": [3, 2, 1]}):
        write_plan(other, b"", {"kind": "TensorRT engine", **facts}, {})
        with pytest.raises(PlanRefused, match="written by another version of ncsn_fast; write it"):
            engine(tiny.model(), plan=other)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        export_trt(tiny.model(), tmp_path, device="cpu")


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
        trt.TrtNetwork(older, other.serialize()[0])


def test_the_command(knobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ncsn_fast.exporters.tensorrt, "resolve_model", lambda _: tiny.model())
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
        (["--format", "trt", "--batch", "4:2:1"], "batch must be"),
        (["--format", "trt", "--size", "8"], "size must be H,W"),
        (["--workspace", "4"], "--workspace is for --format trt"),
        (["--builder-level", "4"], "--builder-level is for --format trt"),
        (["--refit"], "--refit is for --format trt"),
        (["--dtype", "tf32"], "--dtype tf32 is for --format trt"),
    ],
)
def test_usage_errors(words, reason, tmp_path):
    with pytest.raises(UsageError, match=reason):
        export.main(["--out", str(tmp_path / "m"), *words])
