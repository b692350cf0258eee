"""The two-dimensional toy of NCSN (2019): its closed forms, what is learnt, what a run writes."""

import json
import math
import os
import signal
import sys

import pytest
import torch
from cross_section import SLOW
from PIL import Image

from ncsn_fast import train
from ncsn_fast.cli import command
from ncsn_fast.diffusion import objectives
from ncsn_fast.training import toy
from ncsn_fast.training.toy import MIXTURE, Mixture, ToyOptions

SIGMA = 0.5
SHORT = ["--config", "toy", "--steps", "3", "--n", "20", "--width", "8"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mixture_is_a_density_with_its_score():
    grid = torch.linspace(-12, 12, 241, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    for sigma in (None, 2.0):
        density = MIXTURE.log_density(x, sigma).exp()
        assert float(density.sum()) * 0.1**2 == pytest.approx(1, abs=1e-3)
    y = 6 * torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    for sigma in (0.7, 1.0, 5.0):
        by_autograd = objectives.score_of(lambda z, s=sigma: -MIXTURE.log_density(z, s))(y)
        torch.testing.assert_close(MIXTURE.score(y, sigma), by_autograd)
    torch.testing.assert_close(MIXTURE.score(y), MIXTURE.score(y, 1.0))
    one = Mixture((1.0,), ((0.0, 1.0, 2.0),), sigma=2.0)
    x = torch.randn(4, 3, generator=generator())
    torch.testing.assert_close(one.score(x), (torch.tensor([0.0, 1.0, 2.0]) - x) / 4)


def test_draws_of_the_mixture():
    x = MIXTURE.sample(40_000, generator())
    assert torch.equal(x, MIXTURE.sample(40_000, generator()))
    assert toy.share(x) == pytest.approx(0.8, abs=4.5 * math.sqrt(0.16 / 40_000))
    for sign in (1, -1):
        part = x[sign * x.sum(1) > 0] - sign * 5
        assert float(part.mean()) == pytest.approx(0, abs=0.04)
        assert float(part.var()) == pytest.approx(1, abs=0.05)


def test_the_true_score_minimises_every_objective():
    """It beats a shifted and a shrunken one, on the same draws."""
    x = MIXTURE.sample(20_000, generator()).double()
    z = torch.randn(x.shape, generator=generator(1), dtype=x.dtype)

    def losses(score, smooth):
        return torch.stack([
            objectives.explicit(score, x, MIXTURE.score(x)).mean(),
            objectives.implicit(score, x).mean(),
            objectives.sliced(score, x, n_slices=4, generator=generator(2)).mean(),
            objectives.denoising(smooth, x, SIGMA, z).mean(),
        ])  # fmt: skip

    def smooth(y):
        return MIXTURE.score(y, math.hypot(1, SIGMA))

    best = losses(MIXTURE.score, smooth)
    assert best[0] == 0
    for change in (lambda f: lambda y: f(y - 0.2), lambda f: lambda y: 0.8 * f(y)):
        assert bool((losses(change(MIXTURE.score), change(smooth)) > best).all())


class TrueScore(torch.nn.Module):
    """The mixture's score at widths sigma (N,), times a scale that could be learnt."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, sigma):
        both = torch.stack([MIXTURE.score(x, 1.0), MIXTURE.score(x, 4.0)])
        return self.scale * torch.where(sigma[:, None] == 1, *both)


@pytest.mark.parametrize("objective", ["sliced", "sliced-vr", "implicit", "denoising"])
def test_every_objective_learns_the_same_score(objective):
    """At the true score of each level, the gradient of the loss is 0 within its noise."""
    n = 100_000
    sigma = torch.where(torch.arange(n) % 2 == 0, 1.0, 4.0).double()
    centres = Mixture(MIXTURE.weights, MIXTURE.means, sigma=0.0).sample(n, generator(1))
    net, slopes = TrueScore(), []
    torch.set_default_dtype(torch.float64)
    try:
        losses = toy.losses(objective, net, centres.double(), sigma, generator(2))
    finally:
        torch.set_default_dtype(torch.float32)
    for part in losses.split(n // 50):
        slopes.append(torch.autograd.grad(part.mean(), net.scale, retain_graph=True)[0])
    slopes = torch.stack(slopes)
    assert abs(float(slopes.mean())) < 4.5 * float(slopes.std()) / math.sqrt(50) < 0.05


@pytest.fixture(scope="module", params=["sliced", pytest.param("denoising", marks=SLOW)])
def net(request):
    options = ToyOptions(objective=request.param, steps=1500, lr=4e-3)
    fitted, finished = toy.fit(options, progress=False)
    assert finished
    return fitted


def test_the_learnt_field_is_the_true_one_where_data_is(net):
    assert toy.field_error(net) < 0.2
    for sigma in (2.7, 20.0):
        x = Mixture(MIXTURE.weights, MIXTURE.means, sigma).sample(4000, generator())
        with torch.no_grad():
            error = net(x, sigma) - MIXTURE.score(x, sigma)
        assert float(error.square().sum() / MIXTURE.score(x, sigma).square().sum()) < 0.2


def test_annealing_finds_the_weights_and_plain_langevin_does_not(net):
    shares = {name: toy.share(x) for name, x in toy.sample_all(net, 1500, seed=3).items()}
    band = 4.5 * math.sqrt(0.16 / 1500)
    assert shares["exact"] == pytest.approx(0.8, abs=band)
    assert shares["annealed Langevin"] == pytest.approx(0.78, abs=band)  # by its own law: .782
    assert shares["Langevin"] == pytest.approx(0.5, abs=4.5 * math.sqrt(0.25 / 1500))
    assert shares["annealed, learnt scores"] == pytest.approx(0.8, abs=0.15)  # .5 without levels


def test_samples_do_not_depend_on_how_many_there_are():
    few, many = (toy.sample_all(MIXTURE.score, n, seed=1) for n in (5, 9))
    for name in ("Langevin", "annealed Langevin"):
        torch.testing.assert_close(few[name], many[name][:5], rtol=1e-4, atol=1e-4)


def test_what_a_run_writes(in_tmp, capsys):
    for number in range(2):
        assert train.main([*SHORT, "--seed", str(number)]) == 0
    said = capsys.readouterr().out
    assert "trained: runs/toy/fields.png" in said
    assert "annealed Langevin: " in said
    assert sorted(path.name for path in (in_tmp / "runs").iterdir()) == ["toy", "toy-2"]
    run = in_tmp / "runs" / "toy-2"
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "fields.png", "figures.json", "samples.png"}
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["steps"], config["objective"]) == (1, 3, "sliced")
    figures = json.loads((run / "figures.json").read_text())
    assert len(figures) == 5
    for name, size in (("fields.png", (1200, 720)), ("samples.png", (2400, 720))):
        with Image.open(run / name) as image:
            assert image.size == size
            assert len(image.convert("RGB").getcolors(2**16)) > 10


def test_true_and_learnt_arrows_have_one_scale(monkeypatch, tmp_path):
    """A field of half the length is drawn half as long; the longest true arrow is 1.2 long."""
    figures = []
    monkeypatch.setattr(toy, "_save", lambda figure, path: figures.append(figure))
    toy.save_fields(lambda x, sigma: MIXTURE.score(x) / 2, tmp_path / "fields.png")
    true, learnt = (
        next(a for a in panel.collections if type(a).__name__ == "Quiver")
        for panel in figures[0].axes
    )
    assert true.scale == learnt.scale
    assert (true.scale_units, true.angles) == ("xy", "xy")
    longest = [float((a.U**2 + a.V**2).max()) ** 0.5 / a.scale for a in (true, learnt)]
    assert longest == pytest.approx([1.2, 0.6])


def test_the_same_seed_gives_the_same_network():
    options = ToyOptions(steps=4, width=8)
    first, second = (toy.fit(options, progress=False)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dry_run(in_tmp, capsys):
    assert train.main(["--config=toy", "--dry-run", "--lr", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 0.5
    assert not list(in_tmp.iterdir())


def test_interrupted_draws_what_it_learnt(in_tmp, monkeypatch, capsys):
    losses, before, calls = toy.losses, signal.getsignal(signal.SIGINT), []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(*arguments)

    monkeypatch.setattr(toy, "losses", interrupting)
    assert command.run(lambda: train.main(SHORT)) == 130
    assert len(calls) == 2
    assert "stopped and drawn: runs/toy" in capsys.readouterr().out
    assert (in_tmp / "runs" / "toy" / "samples.png").exists()
    assert signal.getsignal(signal.SIGINT) is before


USAGE = {
    "no steps": (["--steps", "0"], "steps must be at least 1; got 0"),
    "no rate": (["--lr", "nan"], "lr must be positive; got nan"),
    "large rate": (["--lr", "2e30"], "lr must be at most 1e+30; got 2e+30"),
    "wide seed": (["--seed", "4294967296"], "seed must be in [0, 2**32)"),
    "path as name": (["--name", "a/b"], "name must be a plain folder name"),
    "no objective": (["--objective", "best"], "invalid choice 'best'"),
    "of images": (["--ngf", "3"], "Unrecognized options: --ngf"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, in_tmp, capsys):
    options, text = USAGE[case]
    assert command.run(lambda: train.main(["--config", "toy", *options])) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not list(in_tmp.iterdir())


def failure(capsys):
    assert command.run(lambda: train.main([*SHORT, "--runs", "here"])) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_without_matplotlib(in_tmp, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "figures need matplotlib: pip install '.[train]'" in failure(capsys)
    assert not list(in_tmp.iterdir())


def test_a_place_that_cannot_be_written(in_tmp, capsys, full_disk):
    (in_tmp / "here").write_text("a file")
    assert "here" in failure(capsys)
    (in_tmp / "here").unlink()
    with full_disk(5000):  # enough for config.json
        assert "cannot write here/toy/fields.png" in failure(capsys)
    assert [path.name for path in (in_tmp / "here" / "toy").iterdir()] == ["config.json"]


def test_a_loss_that_is_not_finite(in_tmp, monkeypatch, capsys):
    losses = toy.losses
    monkeypatch.setattr(toy, "losses", lambda *a: losses(*a) * math.nan)
    assert "the loss is nan at step 0; use a smaller --lr" in failure(capsys)


def test_weights_that_are_not_finite_after_the_last_step(monkeypatch):
    def flat(objective, net, *rest):  # no loss, and no number as its slope
        return sum(weight.sum() for weight in net.parameters()).mul(0).sqrt()

    monkeypatch.setattr(toy, "losses", flat)
    with pytest.raises(RuntimeError, match="a weight is not finite at step 1; use a smaller --lr"):
        toy.fit(ToyOptions(steps=1, width=2), progress=False)
