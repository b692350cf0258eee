"""TensorRT's engines that are kept: in the cache, with other weights, and as files."""

import json
import logging
import multiprocessing

import pytest
import tensorrt_double
import tiny
import torch
from drawing import draw
from trt_cases import engine, install, plans, sampler

import ncsn_fast
from ncsn_fast import EngineError, Sampler, export, export_trt
from ncsn_fast.cli import UsageError
from ncsn_fast.engines import trt, trt_api
from ncsn_fast.engines.plan_cache import PlanRefused


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
    with pytest.raises(UsageError, match=reason):
        export.main(["--out", str(tmp_path / "m"), *words])
