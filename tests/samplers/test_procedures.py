"""Samplers that are no tables, guides and constraints: what Sampler draws with them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from drawing import draw, photos, tiny
from PIL import Image

from ncsn_fast import Sampler, ops, sample
from ncsn_fast.data.images import sample_path, to_uint8
from ncsn_fast.inference import runner
from ncsn_fast.inference.runner import Job
from ncsn_fast.ops.noise import Stream
from ncsn_fast.sampler import SamplingError
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.adaptive import adaptive
from ncsn_fast.samplers.constraints import KnownPixels
from ncsn_fast.samplers.correctors import CORRECTORS
from ncsn_fast.samplers.ode import probability_flow
from ncsn_fast.samplers.predictor_corrector import predictor_corrector
from ncsn_fast.samplers.procedure import contract_noise
from ncsn_fast.samplers.program_transforms import inpainting

LOOSE = {"rtol": 0.2, "atol": 0.2}  # few steps, so that rounding does not change their number


@pytest.fixture(scope="module")
def plain():
    return Sampler(tiny(), engine="eager", batch_size=4)


def start_of(model, samples, seed=0):
    first = float(model.sigmas[0])
    return first * ops.normal(seed, samples, Stream.INITIAL, 0, model.image_shape)


def by_hand(method, sampler, n, seed, corrector="langevin", **options):
    """The plain function on the score of the sampler's own engine, in its padded micro-batches.

    In the same arithmetic, because all that a rounding can flip makes samples jump: whether a step
    is accepted, which trained level is the nearest.

    Returns:
        Images in [0, 1], and evaluations (n,).
    """
    engine, model = sampler.engine_for(n), sampler.model
    ladder, parts = model.sigmas.double().numpy(), []
    for first in range(0, n, engine.batch_size):
        samples = torch.arange(first, first + engine.batch_size).clamp(max=n - 1)
        z = contract_noise(seed, samples, model.image_shape)
        move = CORRECTORS[corrector](seed, samples) if corrector in CORRECTORS else corrector
        with engine.context():
            x = start_of(model, samples, seed)
            if method == "pc":
                kept = {"norm": "sample", "corrector": move, **options}
                found = predictor_corrector(engine.score, x, ladder, z, **kept)
            elif method == "ode":
                kept = {"denoise": True, "compact": False, **options}
                found = probability_flow(engine.score, x, ladder[0], ladder[-1], **kept)
            else:
                ends = ladder[-1], ladder[0]
                found = adaptive(engine.score, x, *ends, z, compact=False, **options)
        parts.append((found.x[: n - first].clamp(0, 1), found.nfe[: n - first]))
    images, nfe = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(nfe)


@pytest.mark.parametrize("method", ["pc", "ode", "adaptive"])
def test_every_engine_draws_what_the_plain_function_does(sampler, method):
    options = {"corrector_steps": 2, "snr": 0.1} if method == "pc" else LOOSE
    expected, nfe = by_hand(method, sampler, 4, 9, **options)
    images = draw(sampler, 4, method=method, seed=9, **options)
    assert torch.equal(images, expected)
    assert sampler.report.nfe == nfe.double().mean()
    assert sampler.report.nfe_most == nfe.max()
    again = draw(sampler, 2, method=method, seed=9, start=2, **options)
    assert torch.equal(again, images[2:])


def test_engines_give_the_score_of_the_model(sampler):
    """At trained levels and between them, but not where two levels are equally near."""
    x = photos(3)
    for sigma in (float(sampler.model.sigmas[1]), 0.9 * float(sampler.model.sigmas[2])):
        with torch.inference_mode():
            expected = sampler.model.score(x, sigma)
        with sampler.engine_for(3).context():
            found = sampler.engine_for(3).score(x, torch.full((3,), sigma))
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("name", "nfe"), [("ula", 1), ("mala", 3), ("hmc", 7)])
def test_chains_can_correct(plain, name, nfe):
    def correct(**options):
        return draw(plain, 3, method="pc", corrector=name, seed=4, **options)

    images = correct()
    assert plain.report.nfe == len(plain.model.sigmas) * (1 + nfe)
    assert torch.equal(images, by_hand("pc", plain, 3, 4, corrector=name)[0])
    assert torch.equal(draw(plain, 1, method="pc", corrector=name, seed=4, start=2)[0], images[2])
    assert not torch.allclose(correct(relative_step=0.01), images, atol=1e-2)
    with pytest.raises(ValueError, match="makes its own noise, which interpolation cannot mix"):
        plain.interpolate(1, 3, method="pc", corrector=name, progress=False)
    with pytest.raises(ValueError, match="corrector 'langevin' has no relative_step; it has snr"):
        draw(plain, 1, method="pc", relative_step=0.1)


@pytest.mark.parametrize("method", ["pc", "adaptive"])
def test_samples_do_not_know_their_batch(plain, method):
    options = LOOSE if method == "adaptive" else {}
    together = draw(plain, 4, method=method, **options)
    for i in range(4):
        assert torch.equal(draw(plain, 1, start=i, method=method, **options)[0], together[i])


def test_evaluations_are_reported(plain):
    draw(plain, 2, method="pc", steps=7, corrector_steps=2)
    assert (plain.report.nfe, plain.report.nfe_most) == (21, 21)
    draw(plain, 3, method="adaptive", **LOOSE)
    assert plain.report.nfe <= plain.report.nfe_most
    draw(plain, 0, method="adaptive")
    assert (plain.report.nfe, plain.report.n) == (0, 0)
    assert plain.plan(8, method="pc", steps=7).nfe == 14
    plan = plain.plan(8, method="ode")
    assert plan.nfe is None
    assert "as many network evaluations as each needs" in str(plan)
    assert plan.flop == plain.plan(8, method="euler", steps=1).flop


@pytest.mark.parametrize("method", ["pc", "ode", "adaptive"])
def test_callbacks_see_the_way_down(plain, method):
    seen = []
    images = draw(plain, 2, method=method, callback=seen.append)
    levels = [p.level for p in seen]
    assert levels == list(range(len(levels)))
    sigmas = [p.sigma for p in seen]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a.nfe < b.nfe for a, b in itertools.pairwise(seen))
    assert seen[-1].x.shape == images.shape
    assert not seen[-1].x.is_inference()
    n_levels = 4 if method == "pc" else 0
    assert all(p.n_levels == n_levels and p.method == method for p in seen)


def test_lost_samples_are_named():
    broken = tiny()
    with torch.no_grad():
        broken.net.end_conv.bias.fill_(float("nan"))
    words = {
        "pc": "sample 6 of seed 5 is no longer finite at level 0",
        "adaptive": "sample 6 of seed 5: the state is no longer finite",
        "ode": "sample 6 of seed 5: the step became too small",
    }
    for method, message in words.items():
        with pytest.raises(SamplingError, match=message):
            draw(Sampler(broken, engine="eager"), 2, seed=5, start=6, method=method)


@pytest.mark.parametrize(
    ("method", "steps", "options", "words"),
    [
        ("ode", 5, {}, "'ode' chooses its own steps; give rtol and atol"),
        ("adaptive", 5, {}, "'adaptive' chooses its own steps"),
        ("pc", 0, {}, "steps must be at least 1; got 0"),
        ("pc", 3, {"snr": 0.0}, "corrector_steps >= 0 and snr > 0"),
        ("pc", 3, {"predictor": "none", "corrector_steps": 0}, "does nothing; give some"),
        ("pc", 3, {"corrector": "hmc", "snr": 0.1}, "corrector 'hmc' has no snr; it has rel"),
        ("pc", 3, {"corrector": "mala", "norm": "batch"}, "corrector 'mala' has no norm"),
        ("pc", 3, {"corrector": "annealed", "norm": "batch"}, "'annealed' has no norm; it has snr"),
        ("pc", 3, {"corrector": "ula", "relative_step": -1.0}, "relative_step must be positive"),
        ("pc", 3, {"corrector": "gibbs"}, "corrector must be one of langevin, annealed, ula"),
        ("adaptive", None, {"atol": 0.0}, "expected rtol >= 0 and atol > 0"),
        ("pc", 3, {"norm": "all"}, "norm must be one of batch, sample"),
        (
            "pc",
            3,
            {"rtol": 0.1},
            "'pc' has no option rtol; it has sigmas, schedule, rho, sigma_min",
        ),
        ("ode", None, {"rtol": -1.0}, "expected rtol >="),
        ("ode", None, {"sigmas": [1.0]}, "'ode' has no option sigmas"),
    ],
)
def test_bad_requests_are_refused(plain, method, steps, options, words):
    with pytest.raises(ValueError, match=words):
        draw(plain, 1, method=method, steps=steps, **options)


def test_a_model_of_one_level():
    one = Sampler(tiny(n_sigmas=1, sigma_begin=0.4), engine="eager")
    draw(one, 2, method="pc")
    assert one.report.nfe == 2
    draw(one, 2, method="ode")
    assert one.report.nfe == 1
    with pytest.raises(ValueError, match="no way to go on a ladder of one level"):
        draw(one, 2, method="adaptive")


def test_batch_norms_are_the_published_ones(plain, caplog):
    draw(plain, 4, method="pc", norm="batch")
    assert "a sample depends on the others of its micro-batch" in caplog.text
    x, ladder = start_of(plain.model, torch.arange(4)), plain.model.sigmas.double().numpy()
    z = contract_noise(0, torch.arange(4), plain.model.image_shape)
    with torch.inference_mode():
        expected = predictor_corrector(plain.model.score, x, ladder, z, norm="batch").x
    assert torch.allclose(
        draw(plain, 4, method="pc", norm="batch"), expected.clamp(0, 1), atol=1e-4
    )


def test_batch_norms_do_not_count_padding(plain):
    """Five samples are a batch of four and one of one, padded to four."""
    alone = draw(plain, 1, method="pc", start=4)
    assert torch.equal(draw(plain, 5, method="pc", norm="batch")[4:], alone)


def test_bad_requests_are_refused_before_anything_is_built():
    sampler = Sampler(tiny(), engine="eager")
    for method, options in (("ode", {"rtol": -1.0}), ("pc", {"corrector": "ula", "snr": 1.0})):
        with pytest.raises(ValueError, match=r"expected rtol|has no snr"):
            sampler.plan(4, method=method, **options)
    assert not sampler._pool.sizes


def test_known_pixels_and_pairs_of_samples(plain):
    mask = torch.arange(8) < 3
    out = plain.inpaint(photos(), mask, method="pc", progress=False)
    assert torch.equal(out[..., :3], photos()[..., :3])
    assert not torch.allclose(out[..., 3:], photos()[..., 3:], atol=0.05)
    known = {"constraint": KnownPixels(mask.expand(2, 3, 8, 8), photos())}
    for method in ("ode", "adaptive"):
        with pytest.raises(ValueError, match=f"'{method}' imposes nothing on its way"):
            run(plain, 2, method, {}, **known)
    frames = plain.interpolate(1, 3, method="adaptive", progress=False, **LOOSE)
    assert torch.equal(frames[0], draw(plain, 1, method="adaptive", **LOOSE)[0])
    assert not torch.equal(frames[0], frames[2])
    with pytest.raises(ValueError, match="'ode' draws none"):
        plain.interpolate(1, 3, method="ode", progress=False)


@dataclasses.dataclass(frozen=True)
class Tilt:
    """A guide that adds a constant to the score of each sample."""

    push: torch.Tensor

    def __len__(self):
        return len(self.push)

    def rows(self, index, device):
        return Tilt(self.push[index].to(device))

    def score(self, score, x, sigma):
        assert sigma.shape == (len(x),)
        return score(x, sigma) + self.push[:, None, None, None]


def run(sampler, n, method, options, **job):
    program = methods.build(method, sampler.model, None, options)
    engine, job = sampler.engine_for(n), Job(torch.arange(n), **job)
    parts = runner.run(engine, program, job, 3, progress=False)
    return torch.cat([part.x for part in parts])


def test_a_guide_can_come_with_a_sample(plain):
    images = draw(plain, 2, guide=Tilt(torch.tensor([0.0, 0.0])))
    assert torch.allclose(images, draw(plain, 2), atol=1e-4)
    assert not torch.allclose(
        draw(plain, 2, guide=Tilt(torch.tensor([3.0, 3.0]))), images, atol=0.1
    )


@pytest.mark.parametrize("method", ["ald", "heun", "dpmpp", "pc", "adaptive"])
def test_guides_change_the_score_of_their_samples(plain, method):
    push = torch.tensor([0.0, 1.0, 0.0, -1.0, 2.0])
    options = LOOSE if method == "adaptive" else {}
    free = run(plain, 5, method, options)
    guided = run(plain, 5, method, options, guide=Tilt(push))
    same = (guided - free).abs().flatten(1).max(dim=1).values
    assert (same[push == 0] < 1e-4).all()
    moved = (guided - free).flatten(1).mean(dim=1)
    assert torch.equal(moved.sign()[push != 0], push.sign()[push != 0])


@pytest.mark.parametrize("method", ["ald", "dpmpp"])
@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
def test_constraints_on_pixels_are_the_tables_own(sampler, method, variant):
    mask = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    known = photos(3)
    program = inpainting(methods.build(method, sampler.model, None, {}), variant)
    engine, parts = sampler.engine_for(3), []
    for job in (
        {"mask": mask, "known": known},
        {"constraint": KnownPixels(mask, known)},
    ):
        drawn = runner.run(engine, program, Job(torch.arange(3), **job), 3, progress=False)
        parts.append(torch.cat([part.x for part in drawn]))
    assert torch.equal(parts[1][mask], known[mask])
    assert torch.allclose(parts[0], parts[1], atol=1e-4)


def test_starting_below_the_first_level(plain):
    own = plain.model.sigmas.double().numpy()
    whole = methods.build("cas", plain.model, None, {})
    part = methods.build("cas", plain.model, None, {"sigma_start": float(own[1])})
    np.testing.assert_allclose(part.sigma, whole.sigma[1:])
    even = methods.build("cas", plain.model, None, {"sigma_start": 0.5}).sigma
    np.testing.assert_allclose(even, np.geomspace(0.5, 0.1, len(even)))
    between = methods.build("reverse", plain.model, None, {"sigma_start": 0.5})
    np.testing.assert_allclose(between.sigma, [0.5, *own[own < 0.5]])
    for method, usual in (("heun", 35), ("dpmpp", 20), ("euler", 50)):
        nfe = methods.build(method, plain.model, None, {"sigma_start": 0.2}).nfe
        assert 1 <= nfe < usual / 2
        assert methods.build(method, plain.model, 5, {"sigma_start": 0.2}).sigma[0] == 0.2
    assert methods.build("em", plain.model, 5, {"sigma_start": 0.5}).sigma[0] == pytest.approx(0.5)
    assert methods.build("ode", plain.model, None, {"sigma_start": 0.5}).sigma[0] == 0.5
    level = methods.build("reverse", tiny(arch="ncsn"), None, {"sigma_start": 0.5}).sigma
    np.testing.assert_allclose(level, own[own < 0.5])
    for wrong in (0.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"sigma_start must be at least 0\.1"):
            methods.build("cas", plain.model, None, {"sigma_start": wrong})


def test_langevin_keeps_its_step_below_the_first_level(plain):
    own = plain.model.sigmas.double().numpy()
    whole = methods.build("ald", plain.model, None, {})
    part = methods.build("ald", plain.model, None, {"sigma_start": float(own[2])})
    np.testing.assert_allclose(part.b, whole.b[4:])
    np.testing.assert_allclose(part.c, whole.c[4:])


def test_the_command_line(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    common = ["--model", "model", "--engine", "eager", "--quiet", "--n", "2", "--out-dir"]
    words = {
        "pc": "--steps 3 --predictor ancestral --corrector annealed --corrector-steps 2 "
        "--order predictor_first --snr 0.2",
        "ode": "--rtol 0.1 --atol 0.2",
        "adaptive": "--rtol 0.3",
    }
    for method, said in words.items():
        folder = tiny_folder.parent / method
        assert sample.main([*common, method, "--method", method, *said.split()]) == 0
        pairs = zip(said.replace("--", "").split()[::2], said.split()[1::2], strict=True)
        options = {k.replace("-", "_"): v for k, v in pairs}
        for name in ("steps", "corrector_steps"):
            options.update({k: int(v) for k, v in options.items() if k == name})
        for name in ("snr", "rtol", "atol"):
            options.update({k: float(v) for k, v in options.items() if k == name})
        expected = draw(Sampler(tiny_folder, engine="eager"), 2, method=method, **options)
        for i, image in enumerate(to_uint8(expected)[..., 0]):
            with Image.open(sample_path(folder, i)) as picture:
                assert np.array_equal(np.asarray(picture), image)
