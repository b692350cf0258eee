"""Sampler on tiny networks: reproducibility, outputs, reports, and what it refuses."""

import dataclasses
import inspect
import logging
import math

import numpy as np
import pytest
import torch
from drawing import CLOSE, NFE, draw, photos, tiny

from ncsn_fast import Sampler, SamplingError, export_onnx
from ncsn_fast.checkpoints import model_folder
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.inference.sampling_params import SamplingCall
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers import methods


def test_a_sample_depends_on_its_index_alone(sampler):
    """Not on n, on start, or on the place in a full or a padded micro-batch."""
    seven = draw(sampler, 7, seed=5)
    assert seven.std() > 0.1
    assert not torch.equal(seven[0], seven[1])
    for n, start in ((1, 0), (3, 2), (1, 6), (5, 1)):
        assert torch.equal(draw(sampler, n, seed=5, start=start), seven[start : start + n])


def test_streams_of_chosen_samples(sampler):
    seven = draw(sampler, 7, seed=5)
    chosen = torch.tensor([6, 0, 3, 2])
    parts = list(sampler.stream(chosen, seed=5, progress=False))
    assert [indices.tolist() for indices, _ in parts] == [[6, 0, 3], [2]]
    assert torch.equal(torch.cat([images for _, images in parts]), seven[chosen])


def test_calls_do_not_disturb_each_other(sampler):
    before = draw(sampler, 2, seed=1)
    draw(sampler, 3, seed=2, method="cas")
    torch.randn(10)
    assert torch.equal(draw(sampler, 2, seed=1), before)


def test_seeds_and_methods_differ(sampler):
    base = draw(sampler, 1)
    assert torch.equal(draw(sampler, 1, seed=0), base)
    for other in (draw(sampler, seed=1), draw(sampler, seed=2**32 - 1), draw(sampler, start=1),
                  draw(sampler, method="cas"), draw(sampler, n_steps_each=1)):  # fmt: skip
        assert not torch.allclose(other, base, atol=0.05)


def test_sampling_is_annealed_langevin_dynamics(plain):
    """The whole path against a loop written from the paper, with the noise by its definition."""
    model, samples, shape = tiny().eval(), torch.tensor([3, 4]), (3, 8, 8)
    x = noise.uniform(9, samples, Stream.INITIAL, 0, shape)
    with torch.inference_mode():
        for k in range(8):
            sigma = float(model.sigmas[k // 2])
            alpha = 1e-3 * sigma**2 / 0.1**2
            z = noise.normal(9, samples, Stream.SAMPLER, k, shape)
            x = x + alpha * model.score(x, sigma) + math.sqrt(2 * alpha) * z
        x = x + 0.1**2 * model.score(x, 0.1)
    torch.testing.assert_close(draw(plain, 2, seed=9, start=3), x.clamp(0, 1), **CLOSE)


@pytest.mark.parametrize("channels", [1, 3])
def test_outputs(channels):
    sampler = Sampler(tiny(channels=channels, image_size=(8, 12)), batch_size=2)
    pt, array, images = (draw(sampler, 3, output=kind) for kind in ("pt", "np", "pil"))
    assert (pt.shape, pt.dtype, pt.device.type) == ((3, channels, 8, 12), torch.float32, "cpu")
    assert 0 <= pt.min() < pt.max() <= 1
    assert (array.shape, array.dtype) == ((3, 8, 12, channels), np.uint8)
    np.testing.assert_array_equal(array, (pt * 255).round().permute(0, 2, 3, 1).numpy())
    assert [(i.mode, i.size) for i in images] == [({1: "L", 3: "RGB"}[channels], (12, 8))] * 3
    np.testing.assert_array_equal(np.stack([np.atleast_3d(i) for i in images]), array)


@pytest.mark.parametrize(("output", "shape"), [("pt", (0, 3, 8, 8)), ("np", (0, 8, 8, 3))])
def test_no_samples(plain, output, shape):
    assert draw(plain, 0, output=output).shape == shape
    assert draw(plain, 0, output="pil") == []
    assert (plain.report.n, plain.report.nfe) == (0, NFE)
    assert (plain.plan(0).n_batches, plain.plan(0).flop) == (0, 0)


def test_an_initial_state_replaces_the_drawn_one(sampler):
    own = noise.uniform(4, torch.arange(2), Stream.INITIAL, 0, (3, 8, 8))
    kept = own.clone()
    assert torch.equal(draw(sampler, 2, seed=4, init=own), draw(sampler, 2, seed=4))
    assert torch.equal(own, kept)
    other = draw(sampler, 2, seed=4, init=photos(), n_steps_each=0)
    level = torch.tensor([3, 3])
    expected = photos() + 0.1**2 * sampler.model.score_at(photos(), level).detach()
    torch.testing.assert_close(other, expected.clamp(0, 1), **CLOSE)


def test_callbacks_follow_the_levels(sampler):
    told, states = [], []

    def callback(progress):
        told.append(progress)
        states.append(progress.x.clone())

    images = draw(sampler, 4, seed=2, start=10, callback=callback)
    assert [p.samples.tolist() for p in told] == [[10, 11, 12]] * 5 + [[13]] * 5
    assert [p.level for p in told] == [0, 1, 2, 3, 4] * 2
    assert [p.nfe for p in told] == [2, 4, 6, 8, 9] * 2
    ladder = [*TINY_LADDER, 0.1]
    assert [p.sigma for p in told] == pytest.approx(ladder * 2, rel=1e-5)
    assert {(p.method, p.n_levels) for p in told} == {("ald", 5)}
    assert [len(x) for x in states] == [3] * 5 + [1] * 5
    assert torch.equal(torch.cat((states[4], states[9])).clamp(0, 1), images)


TINY_LADDER = [2.0, 2.0 * 20 ** (-1 / 3), 2.0 * 20 ** (-2 / 3), 0.1]


def test_exceptions_of_callbacks_come_through(plain):
    class Enough(Exception):
        pass

    def callback(progress):
        if progress.level == 2:
            raise Enough

    with pytest.raises(Enough):
        draw(plain, 2, callback=callback)
    assert draw(plain, 2).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "nfe"),
    [
        ({}, NFE),
        ({"denoise": False}, 8),
        ({"n_steps_each": 1}, 5),
        ({"steps": 2}, 5),
        ({"steps": 1, "epsilon": 2.0}, 3),
        ({"method": "cas"}, 4),
        ({"method": "cas", "steps": 6}, 6),
        ({"method": "cas", "n_sigma": 3}, 10),
    ],
)
def test_reported_evaluations_are_those_made(monkeypatch, options, nfe):
    calls = []
    plain = Sampler(tiny(), engine="eager", batch_size=3)
    engine = plain.engine_for(4)
    original = engine.network
    monkeypatch.setattr(engine, "network", lambda x, k: calls.append(len(x)) or original(x, k))
    draw(plain, 4, **options)
    report = plain.report
    assert calls == [3] * 2 * nfe
    assert report.nfe == nfe
    assert (report.method, report.n) == (options.get("method", "ald"), 4)
    assert (report.engine, report.dtype, report.batch_size) == ("eager", "fp32", 3)
    assert report.seconds > 0
    assert plain.plan(4, **options).nfe == nfe


def test_plan(sampler):
    plan = sampler.plan(7)
    assert (plan.method, plan.n, plan.nfe, plan.batch_size, plan.n_batches) == ("ald", 7, NFE, 3, 3)
    assert (plan.engine, plan.dtype, plan.device) == (sampler.report.engine, "fp32", "cpu")
    assert plan.flop == network_flop(sampler.model) * NFE * 9
    assert plan.seconds > 0
    assert "7 samples, 9 network evaluations each, 3 micro-batches of 3" in str(plan)


def test_a_sample_that_leaves_the_numbers_is_named(monkeypatch):
    network, levels = EagerEngine.network, []

    def spoil(self, x, level):
        f = network(self, x, level)
        if len(levels) == 2:
            f[1] = math.inf
        return f

    monkeypatch.setattr(EagerEngine, "network", spoil)
    sampler = Sampler(tiny(), engine="eager", batch_size=3)
    with pytest.raises(SamplingError, match=r"sample 6 of seed 0 .* at level 2 \(sigma 0\.2714\)"):
        draw(sampler, 3, start=5, callback=lambda progress: levels.append(progress.level))


def test_chains_that_explode_are_named(sampler):
    with pytest.raises(SamplingError, match=r"sample 5 of seed 0 .* at level 0 \(sigma 2\)"):
        draw(sampler, 3, start=5, epsilon=1e36)


def test_callbacks_cannot_disturb_the_chains_and_may_use_autograd(plain):
    def meddle(progress):
        progress.x.requires_grad_().square().sum().backward()
        assert torch.equal(progress.x.grad, 2 * progress.x.detach())
        with torch.no_grad():
            progress.x.fill_(math.nan)
            progress.samples.fill_(7)

    assert torch.equal(draw(plain, 3, callback=meddle), draw(plain, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: draw(s, seed=2**32), r"seed must be in \[0, 2\*\*32\); got 4294967296"),
        (lambda s: draw(s, seed=-1), r"seed must be in .*; got -1"),
        (lambda s: draw(s, -1), "n must be at least 0; got -1"),
        (lambda s: draw(s, 2, start=2**32 - 1), "last sample index must be in"),
        (lambda s: draw(s, start=-1), "first sample index must be in"),
        (
            lambda s: list(s.stream(torch.tensor([2**32]), progress=False)),
            "sample indices must be in",
        ),
        (lambda s: draw(s, method="no"), "method must be one of ald, fast, cas, .*; got 'no'"),
        (lambda s: draw(s, method="cas", n_steps_each=1), "'cas' has no option n_steps_each"),
        (lambda s: draw(s, steps=0), "steps must be at least 1; got 0"),
        (lambda s: draw(s, output="jpg"), "output must be 'pt', 'np' or 'pil'; got 'jpg'"),
        (lambda s: draw(s, 3, init=photos(2)), "expected 3 images; got 2"),
        (lambda s: draw(s, 2, init=photos(2, 1)), r"works on images \(N, 3, 8, 8\)"),
        (lambda s: s.inpaint(photos(), True, variant="v3", progress=False), "'ncsnv2' or 'ncsn'"),
        (lambda s: s.interpolate(1, 0, progress=False), "n_frames must be at least 1; got 0"),
        (lambda s: s.interpolate(1, -1, progress=False), "n_frames must be at least 1; got -1"),
        (lambda s: s.score(photos(), 0.0), "sigma must be positive and finite; got 0.0"),
        (lambda s: s.denoise(photos(), math.nan), "sigma must be positive and finite; got nan"),
        (lambda s: s.plan(1, method="x"), "method must be one of"),
        (lambda s: s.plan(-1), "n must be at least 0; got -1"),
    ],
)
def test_bad_calls_are_refused(plain, call, words):
    with pytest.raises(ValueError, match=words):
        call(plain)


@pytest.mark.parametrize("bad", [1.5, 2.0, True, "2", np.float64(2)])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("batch_size", lambda s, bad: Sampler(s.model, engine="eager", batch_size=bad)),
        ("threads", lambda s, bad: Sampler(s.model, engine="eager", threads=bad)),
        ("n", lambda s, bad: draw(s, bad)),
        ("seed", lambda s, bad: draw(s, 1, seed=bad)),
        ("start", lambda s, bad: draw(s, 1, start=bad)),
        ("steps", lambda s, bad: draw(s, 1, steps=bad)),
        ("n_steps_each", lambda s, bad: draw(s, 1, n_steps_each=bad)),
        ("corrector_steps", lambda s, bad: draw(s, 1, method="pc", corrector_steps=bad)),
        ("n_frames", lambda s, bad: s.interpolate(1, bad, progress=False)),
        ("n", lambda s, bad: s.interpolate(bad, 2, progress=False)),
        ("factor", lambda s, bad: s.super_resolve(torch.zeros(1, 3, 4, 4), bad)),
        ("n", lambda s, bad: s.plan(bad)),
        ("n_probes", lambda s, bad: s.log_likelihood(torch.zeros(1, 3, 8, 8), n_probes=bad)),
        ("batch_size", lambda s, bad: s.log_likelihood(torch.zeros(1, 3, 8, 8), batch_size=bad)),
        ("opset", lambda s, bad: export_onnx(s.model, "m.onnx", opset=bad)),
    ],
)
def test_fractions_and_truths_are_no_counts(plain, name, call, bad):
    with pytest.raises(TypeError, match=f"^{name} must be an integer; got "):
        call(plain, bad)


def test_integers_of_numpy_and_torch_count(plain):
    assert torch.equal(draw(plain, np.int64(2), seed=torch.tensor(3)), draw(plain, 2, seed=3))


def test_indices_of_a_stream_are_integers(plain):
    with pytest.raises(ValueError, match=r"integer indices \(n,\); got torch.float32 \(2,\)"):
        plain.stream([0.5, 1.0])


def test_a_stop_of_a_callback_is_said(plain):
    def stop(progress):
        raise StopIteration

    with pytest.raises(SamplingError, match="callback, guide or classifier raised StopIteration"):
        draw(plain, 1, callback=stop)


def test_repr_tells_what_runs(plain):
    shape = "x".join(map(str, plain.model.image_shape))
    assert repr(plain) == (
        f"<Sampler of {plain.model.config.arch}, images {shape}: engine cpu, fp32, on cpu, "
        "batch_size=3>"
    )


def test_without_a_model_the_newest_run_is_taken_else_the_shipped_one(
    tmp_path, monkeypatch, caplog
):
    shipped, run = tmp_path / "shipped", tmp_path / "runs" / "mine"
    model_folder.save_model(tiny(), shipped)
    monkeypatch.setattr("ncsn_fast.checkpoints.loading.SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert Sampler(device="cpu").model.config.n_sigmas == 4
    assert "the shipped digits model" in caplog.text
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(
        "ncsn_fast.checkpoints.loading.newest_run", lambda f: run if f.exists() else None
    )
    monkeypatch.setattr("ncsn_fast.checkpoints.loading.load", lambda source: tiny(n_sigmas=7) if
    source == run
                        else pytest.fail(f"loaded {source}"))  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert Sampler(device="cpu").model.config.n_sigmas == 7
    assert f"the newest run, {run.relative_to(tmp_path)}" in caplog.text or str(run) in caplog.text


def test_the_newest_run_is_told_where_logging_is_not_configured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loading = "ncsn_fast.checkpoints.loading"
    monkeypatch.setattr(f"{loading}.newest_run", lambda folder: folder / "a")
    monkeypatch.setattr(f"{loading}.load", lambda source: tiny(n_sigmas=7))
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    for _ in range(2):
        Sampler(device="cpu")
    assert capsys.readouterr().err.count("ncsn_fast: model: the newest run, runs/a\n") == 1


def test_a_report_names_model_method_and_engine():
    sampler = Sampler(tiny(), engine="eager", device="cpu")
    sampler.sample(1, method="fast", steps=2, progress=False)
    report = sampler.report
    assert (report.model, report.method, report.engine) == ("ncsnv2 3x8x8", "fast", "eager")


def test_a_model_folder_is_taken_as_it_is(tmp_path):
    model = tiny(n_sigmas=5)
    model_folder.save_model(model, tmp_path / "m")
    sampler = Sampler(str(tmp_path / "m"), engine="eager", batch_size=1)
    assert torch.equal(draw(sampler), draw(Sampler(model, engine="eager", batch_size=1)))


def test_streams_check_before_they_start(plain):
    with pytest.raises(ValueError, match="seed must be in"):
        plain.stream([0], seed=-1)
    with pytest.raises(ValueError, match=r"indices \(n,\)"):
        plain.stream([[0, 1]])
    parts = list(plain.stream([5, 2, 9, 0], progress=False))
    assert torch.cat([indices for indices, _ in parts]).tolist() == [5, 2, 9, 0]
    assert torch.equal(parts[1][1], draw(plain, 1))


@pytest.mark.parametrize(
    "name", ["sample", "inpaint", "restore", "colourise", "super_resolve", "deblur", "sdedit",
             "guided", "interpolate"],
)  # fmt: skip
def test_methods_of_sampler_show_what_they_take(name):
    """In their signatures, with the defaults of SamplingCall and of the methods' builders."""
    shown = inspect.signature(getattr(Sampler, name)).parameters
    for field in dataclasses.fields(SamplingCall):
        own = name == "guided" and field.name == "labels"  # of its classifier
        if field.name != "options" and not own:
            assert shown[field.name].default == field.default, field.name
            assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert set(methods.OPTIONS) < set(shown)
    assert (shown["n_sigma"].default, shown["eta"].default) == (1, ...)
    assert list(shown)[-1] == "options"


def test_help_of_sample_tells_the_methods_of_an_option():
    told = " ".join(Sampler.sample.__doc__.split())
    for name, row in methods.OPTIONS.items():
        assert f"{name}: {row.help} (default: {methods.defaults(name)})" in told
