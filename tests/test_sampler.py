"""Sampler on tiny networks: reproducibility, outputs, editing, and what it refuses."""

import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import (
    EngineError,
    EngineUnavailable,
    ModelConfig,
    Sampler,
    SamplingError,
    ScoreModel,
    checkpoint,
    engines,
    noise,
)
from ncsn_fast.engines.cpu import CpuEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.noise import Stream
from ncsn_fast.plan import network_flop

TINY = ModelConfig(
    image_size=(8, 8), ngf=2, n_sigmas=4, sigma_begin=2.0, sigma_end=0.1, epsilon=1e-3,
    n_steps_each=2,
)  # fmt: skip
NFE = 4 * 2 + 1
CLOSE = {"rtol": 0.0, "atol": 1e-4}  # states of rounding's size apart, after NFE evaluations


def tiny(**fields):
    torch.manual_seed(0)
    return ScoreModel(dataclasses.replace(TINY, **fields))


@pytest.fixture(scope="module", params=["ncsnv2", "ncsn"])
def model(request):
    return tiny(arch=request.param)


@pytest.fixture(scope="module", params=["eager", "cpu"])
def sampler(request, model):
    return Sampler(model, engine=request.param, dtype="fp32", batch_size=3, threads=1)


@pytest.fixture(scope="module")
def plain():
    return Sampler(tiny(), engine="cpu", dtype="fp32", batch_size=3, threads=1)


def draw(sampler, n=1, **options):
    return sampler.sample(n, progress=False, **options)


def photos(n=2, channels=3, seed=0):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batch_sizes_and_engines_agree_to_rounding(model, batch_size):
    expected = draw(Sampler(model, engine="eager", batch_size=3), 4)
    for engine in ("eager", "cpu"):
        other = draw(Sampler(model, engine=engine, dtype="fp32", batch_size=batch_size), 4)
        torch.testing.assert_close(other, expected, **CLOSE)


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn", "ncsnv2_deeper"])
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_numbers_of_threads_change_nothing(engine, arch):
    before = torch.get_num_threads()
    model = tiny(arch=arch, ngf=8, n_sigmas=2)
    one, two = (
        draw(Sampler(model, engine=engine, batch_size=4, threads=t), 3, method="cas")
        for t in (1, 2)
    )
    assert torch.equal(two, one)
    assert torch.get_num_threads() == before


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


def damaged():
    model = tiny()
    with torch.no_grad():
        model.net.end_conv.bias[1] = math.nan
    return model


def test_damaged_weights_stop_the_sampling():
    with pytest.raises(SamplingError, match=r"sample 7 of seed 5 .* at level 0 \(sigma 2\)"):
        draw(Sampler(damaged(), engine="eager"), 2, seed=5, start=7)
    for dtype in ("fp32", "bf16"):
        with pytest.raises(EngineError, match=r"own output is not finite .* weights are damaged"):
            draw(Sampler(damaged(), engine="cpu", dtype=dtype))


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


def test_callers_settings_do_not_reach_the_engine(plain):
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert torch.equal(draw(plain, 2), draw(plain, 2))
        inside = draw(plain, 2)
    assert torch.equal(inside, draw(plain, 2))


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


MASKS = {
    "one for all": torch.arange(64).reshape(8, 8) % 3 == 0,
    "rows": (torch.arange(8) < 3)[:, None],
    "one per channel": torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5,
    "one per image": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.5,
    "numbers": (torch.arange(8.0) - 4).clamp(0, 1),
    "list": [[0, 1, 0, 1, 0, 0, 1, 1]] * 8,
    "array": np.eye(8),
    "all": True,
    "none": False,
}


@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_inpainting_returns_known_pixels_exactly(plain, mask, variant):
    def inpaint(images):
        return plain.inpaint(images, mask, variant=variant, n_steps_each=1, progress=False)

    images, known = photos(), (torch.as_tensor(mask) != 0).expand(2, 3, 8, 8)
    images[~known] = 0.123
    out = inpaint(images)
    assert torch.equal(out[known], photos()[known])
    if not known.all():
        assert (out[~known] - 0.123).abs().max() > 0.1
        images[~known] = -77.0  # unknown pixels may hold anything
        assert torch.equal(inpaint(images), out)


@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
def test_inpainting_with_every_network_and_engine(sampler, variant):
    mask = MASKS["one per image"].expand(2, 3, 8, 8)
    out = sampler.inpaint(photos(), mask, variant=variant, method="cas", progress=False)
    assert torch.equal(out[mask], photos()[mask])
    assert not torch.allclose(out[~mask], photos()[~mask], atol=0.1)


def test_inpainting_nothing_known_is_sampling(sampler):
    out = sampler.inpaint(photos(), False, seed=3, start=4, progress=False)
    assert torch.equal(out, draw(sampler, 2, seed=3, start=4))


def test_inpainting_variants_and_seeds_differ(plain):
    mask = MASKS["one for all"]
    outs = [
        plain.inpaint(photos(), mask, progress=False, **options)
        for options in ({}, {"variant": "ncsn"}, {"seed": 1}, {"start": 1}, {"method": "cas"})
    ]
    for i, a in enumerate(outs):
        assert all(not torch.allclose(a, b, atol=0.05) for b in outs[:i])


def test_inpainting_of_8_bit_images_gives_their_bytes_back(plain):
    images = (photos().permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    mask = MASKS["one for all"].numpy()
    out = plain.inpaint(images, mask, output="np", progress=False)
    np.testing.assert_array_equal(out[:, mask], images[:, mask])
    pils = [Image.fromarray(i) for i in images]
    np.testing.assert_array_equal(plain.inpaint(pils, mask, output="np", progress=False), out)


@pytest.mark.parametrize(
    "mask", [torch.ones(7, 8), torch.ones(3, 3, 8, 8), torch.ones(1, 2, 3, 8, 8)]
)
def test_masks_that_do_not_fit_are_refused(plain, mask):
    with pytest.raises(ValueError, match=r"mask must broadcast to the images \(2, 3, 8, 8\)"):
        plain.inpaint(photos(), mask, progress=False)


def test_interpolation(sampler):
    frames = sampler.interpolate(2, 4, seed=3, start=5, progress=False).reshape(2, 4, 3, 8, 8)
    samples = draw(sampler, 2, seed=3, start=5)
    assert torch.equal(frames[:, 0], samples)
    for row in frames:
        steps = [(a - b).square().mean() for a, b in itertools.pairwise(row)]
        assert min(steps) > 0
        assert max(steps) < (row[0] - row[-1]).square().mean()
    assert torch.equal(sampler.interpolate(2, 1, seed=3, start=5, progress=False), samples)
    assert sampler.interpolate(0, 4, progress=False).shape == (0, 3, 8, 8)


def test_scores_are_the_models(sampler):
    model, x = sampler.model, photos(4)
    for sigma in (2.0, 0.3, 0.1):
        expected = model.score(x, sigma).detach()
        error = (sampler.score(x, sigma) - expected).abs().max() / expected.abs().max()
        assert error < 2e-5
    assert sampler.score(photos(0), 1.0).shape == (0, 3, 8, 8)


def test_denoising_is_tweedies_formula(sampler):
    x = photos(4)
    expected = (x + 0.3**2 * sampler.model.score(x, 0.3).detach()).clamp(0, 1)
    torch.testing.assert_close(sampler.denoise(x, 0.3), expected, **CLOSE)
    assert sampler.denoise(x, 0.3, output="np").shape == (4, 8, 8, 3)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_names_of_types(dtype):
    assert Sampler(tiny(), engine="cpu", dtype=dtype).dtype == "bf16"


def test_engines_of_other_sizes_share_their_weights():
    sampler = Sampler(tiny(), engine="cpu")
    small, large = sampler.engine_for(1), sampler.engine_for(5)
    assert (small.batch_size, large.batch_size) == (1, 8)
    assert small._weights is large._weights
    assert sampler.engine_for(6) is large


def test_the_engine_that_auto_means(caplog):
    with caplog.at_level(logging.INFO):
        assert Sampler(tiny(), device="cpu").engine_class.name == "cpu"
    assert f"engine cpu (our kernels), {CpuEngine.default_dtype()}, on cpu" in caplog.text


@pytest.mark.parametrize("engine", ["compile", "cuda", "ort", "trt"])
def test_engines_that_cannot_run_say_so(engine):
    with pytest.raises(EngineUnavailable, match=f"'{engine}' .* not part of this .*: cpu, eager"):
        Sampler(tiny(), engine=engine, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "warp"}, "engine must be auto, cpu, eager, .*; got 'warp'"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"engine": "eager", "dtype": "bf16"}, "'eager' computes in fp32; got dtype 'bf16'"),
        ({"engine": "cpu", "dtype": torch.float16}, "'cpu' computes in fp32 or bf16; got dtype"),
        ({"engine": "cpu", "compile_cache": "x"}, "'cpu' compiles nothing"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Sampler(tiny(), device="cpu", **options)


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
        (lambda s: draw(s, method="heun"), "method must be one of ald, cas; got 'heun'"),
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


def test_without_a_model_the_newest_run_is_taken_else_the_shipped_one(
    tmp_path, monkeypatch, caplog
):
    shipped, run = tmp_path / "shipped", tmp_path / "runs" / "mine"
    checkpoint.save_model(tiny(), shipped)
    monkeypatch.setattr("ncsn_fast.sampler.SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert Sampler(device="cpu").model.config.n_sigmas == 4
    assert "the shipped digits model" in caplog.text
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(checkpoint, "newest_run", lambda folder: run if folder.exists() else None)
    monkeypatch.setattr("ncsn_fast.sampler.load", lambda source: tiny(n_sigmas=7) if source == run
                        else pytest.fail(f"loaded {source}"))  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert Sampler(device="cpu").model.config.n_sigmas == 7
    assert f"the newest run, {run.relative_to(tmp_path)}" in caplog.text or str(run) in caplog.text


def test_a_model_folder_is_taken_as_it_is(tmp_path):
    model = tiny(n_sigmas=5)
    checkpoint.save_model(model, tmp_path / "m")
    sampler = Sampler(str(tmp_path / "m"), engine="eager", batch_size=1)
    assert torch.equal(draw(sampler), draw(Sampler(model, engine="eager", batch_size=1)))


@pytest.mark.parametrize("soft", [0.5, 255, math.nan])
def test_soft_masks_are_refused(plain, soft):
    with pytest.raises(ValueError, match="boolean, or 0 and 1"):
        plain.inpaint(photos(), torch.full((8, 8), soft), progress=False)


def test_known_pixels_of_another_range_are_refused(plain):
    images, mask = 2 * photos() - 1, MASKS["one for all"]
    with pytest.raises(ValueError, match=r"map images in \[-1, 1\]"):
        plain.inpaint(images, mask, progress=False)
    images[:, :, ~mask] = -7  # unknown pixels may hold anything finite
    known = photos()[:, :, mask]
    images[:, :, mask] = known
    assert torch.equal(plain.inpaint(images, mask, progress=False)[:, :, mask], known)


def test_scores_at_one_sigma_per_image(model):
    sampler, x = Sampler(model, engine="eager"), photos(3)
    together = sampler.score(x, torch.tensor([2.0, 0.5, 0.1]))
    each = torch.cat([sampler.score(x[i : i + 1], s) for i, s in enumerate((2.0, 0.5, 0.1))])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-4 * each.abs().max().item())
    with pytest.raises(ValueError, match=r"sigma must be a number or \(3,\)"):
        sampler.score(x, torch.ones(2))


def test_streams_check_before_they_start(plain):
    with pytest.raises(ValueError, match="seed must be in"):
        plain.stream([0], seed=-1)
    with pytest.raises(ValueError, match=r"indices \(n,\)"):
        plain.stream([[0, 1]])
    parts = list(plain.stream([5, 2, 9, 0], progress=False))
    assert torch.cat([indices for indices, _ in parts]).tolist() == [5, 2, 9, 0]
    assert torch.equal(parts[1][1], draw(plain, 1))


@pytest.mark.parametrize("gpu", [True, False])
def test_engines_choose_their_device(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert engines.pick("cpu", None)[:2] == (CpuEngine, cpu)
    assert engines.pick("auto", "cpu")[:2] == (CpuEngine, cpu)
    assert engines.pick("eager", None)[1] == (cuda if gpu else cpu)
    assert engines.pick("auto", None)[1] == (cuda if gpu else cpu)
    message = "engine 'cpu' runs on cpu; got device 'cuda'" if gpu else "torch sees no NVIDIA GPU"
    with pytest.raises(ValueError, match=message):
        engines.pick("cpu", "cuda")
    with pytest.raises(ValueError, match="engine 'eager' runs on cpu or cuda; got device 'mps'"):
        engines.pick("eager", "mps")


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_no_steps_still_return_known_pixels(engine):
    images, mask = photos(), MASKS["one for all"]
    sampler = Sampler(tiny(), engine=engine)
    out = sampler.inpaint(images, mask, n_steps_each=0, denoise=False, progress=False)
    assert (sampler.report.nfe, torch.equal(out[:, :, mask], images[:, :, mask])) == (0, True)
