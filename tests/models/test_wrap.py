"""Networks of the user's own: every parameterisation, shape and method, by closed forms."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import ncsn_fast
from ncsn_fast import CheckpointError
from ncsn_fast.diffusion.parameterisation import DiscreteVP, Parameterisation, standard
from ncsn_fast.diffusion.sde import VE, VP, SubVP
from ncsn_fast.samplers.methods import METHODS

MEAN, STD = 0.4, 0.2  # of the Gaussian data that the exact networks know
SEEN = {
    "sigma": lambda c: c,
    "log_sigma": torch.exp,
    "log_sigma/4": lambda c: torch.exp(4 * c),
}
ENDS = {"sigma_min": 0.01, "sigma_max": 20.0}


def column(values, x):
    return values.view(-1, *[1] * (x.ndim - 1))


def denoised(x, sigma, mean=MEAN, std=STD):
    """E[x_0 | x] of N(mean, std^2) with noise sigma."""
    return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


class Exact(nn.Module):
    """The network of a parameterisation that knows the score of N(mean, std^2) exactly."""

    def __init__(self, known, sigma_of, mean=MEAN, std=STD):
        super().__init__()
        self.known, self.sigma_of, self.mean, self.std = known, sigma_of, mean, std

    def forward(self, u, c):
        sigma = self.sigma_of(c.double())
        skip, out, inner = (
            column(f(sigma), u) for f in (self.known.c_skip, self.known.c_out, self.known.c_in)
        )
        x = u.double() / inner
        clean = denoised(x, column(sigma, u), self.mean, self.std)
        return ((clean - skip * x) / out).float()


CASES = {
    "score": ("score", "sigma", None),
    "score of VP": ("score", "sigma", VP()),
    "score of sub-VP": ("score", "log_sigma", SubVP()),
    "scaled score": ("scaled_score", "log_sigma", None),
    "scaled score of VE": ("scaled_score", "sigma", VE()),
    "epsilon": ("epsilon", "sigma", None),
    "epsilon of VP": ("epsilon", "sigma", VP()),
    "epsilon of DDPM": ("epsilon", "log_sigma", DiscreteVP()),
    "denoised": ("denoised", "sigma", None),
    "denoised of VP": ("denoised", "sigma", VP()),
    "v": ("v", "sigma", VP()),
    "v of DDPM": ("v", "log_sigma", DiscreteVP(betas="cosine")),
    "EDM": ("edm", None, None),
}


def exact_model(case, data_range=None, shape=(1, 4, 4), **options):
    predicts, sees, process = CASES[case]
    known = standard(predicts, sees=sees, process=process)
    low, high = data_range or (0.0, 1.0)
    net = Exact(known, SEEN[sees or "log_sigma/4"], low + (high - low) * MEAN, (high - low) * STD)
    return ncsn_fast.wrap(
        net, predicts=predicts, sees=sees, process=process, image_shape=shape,
        data_range=data_range, **{**ENDS, "n_sigmas": 12, "n_steps_each": 2, **options},
    )  # fmt: skip


@pytest.mark.parametrize("data_range", [None, (-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("case", CASES)
def test_the_score_is_the_gaussians(case, data_range):
    model = exact_model(case, data_range)
    x = torch.linspace(-2, 3, 48).view(3, 1, 4, 4)
    sigma = torch.tensor([0.02, 0.3, 4.0])
    exact = (denoised(x.double(), column(sigma.double(), x)) - x) / column(sigma.double() ** 2, x)
    # F is a float32 number, which c_out / sigma magnifies where the network predicts x_0 or x_t.
    scale = (1 + x.abs()) / column(sigma, x) ** 2
    assert ((model.score(x, sigma).double() - exact).abs() <= 2e-6 * scale).all()
    torch.testing.assert_close(
        model.denoise(x, sigma), denoised(x, column(sigma, x)), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_samples_for_every_parameterisation(method):
    """An exact score, of whatever network: the same noise gives the same images to rounding."""
    results = {}
    for case in ("scaled score", "epsilon of VP", "denoised", "v", "EDM"):
        if method == "em" and CASES[case][2] is not None:
            continue  # em runs the network's own SDE, here VP's, with steps of its own
        model = exact_model(case, (-1.0, 1.0))
        sampler = ncsn_fast.Sampler(model, engine="eager")
        results[case] = sampler.sample(3, seed=4, method=method, progress=False)
        assert sampler.report.engine == "eager"
    first = results.pop("scaled score")
    assert first.std() > 0.02
    for case, images in results.items():
        # Accept-reject steps and adaptive solvers may part ways where float32 sums differ.
        jumps = method in ("adaptive", "ode", "mala", "hmc")
        assert (images - first).abs().max() < (0.02 if jumps else 2e-3), case


@pytest.mark.parametrize(("case", "method"), [("EDM", "heun"), ("epsilon of VP", "em")])
def test_samples_have_the_moments_of_the_data(case, method):
    model = exact_model(case, None, (1, 8, 8), n_sigmas=40)
    x = ncsn_fast.Sampler(model, engine="eager").sample(200, method=method, progress=False)
    assert abs(float(x.mean()) - MEAN) < 5 * STD / math.sqrt(x.numel())
    assert abs(float(x.std()) / STD - 1) < 0.05


# Shapes ------------------------------------------------------------------------------------------


class Points(nn.Module):
    """A multilayer perceptron on points in the plane."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, sigma):
        return self.layers(torch.cat([x, sigma.log()[:, None]], dim=1))


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


SHAPES = {
    "points": (Points, (2,), {"sees": "sigma"}),
    "signals": (Signal, (2, 16), {}),
    "volumes": (Volume, (1, 4, 6, 5), {}),
}


def shaped(name):
    net, shape, options = SHAPES[name]
    torch.manual_seed(0)
    return ncsn_fast.wrap(
        net(), predicts="epsilon", image_shape=shape, data_range=None, n_sigmas=6,
        n_steps_each=1, sigma_min=0.1, sigma_max=3.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPES)
def test_data_of_any_shape(name, method):
    model, shape = shaped(name), SHAPES[name][1]
    sampler = ncsn_fast.Sampler(model, engine="eager")
    x = sampler.sample(3, method=method, progress=False)
    assert x.shape == (3, *shape)
    assert x.isfinite().all()
    again = sampler.sample(1, start=2, method=method, progress=False)
    jumps = method in ("adaptive", "ode", "mala", "hmc")
    torch.testing.assert_close(again, x[2:], rtol=0, atol=0.05 if jumps else 1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_scores_and_starts_in_the_users_shape(name):
    model, shape = shaped(name), SHAPES[name][1]
    sampler = ncsn_fast.Sampler(model, engine="eager")
    x = torch.linspace(-1, 1, 2 * math.prod(shape)).view(2, *shape)
    arguments = (x, torch.full((2,), 0.5)) if name == "points" else (x,)
    expected = -model.net.net(*arguments) / 0.5
    torch.testing.assert_close(sampler.score(x, 0.5), expected.detach(), rtol=1e-5, atol=1e-6)
    started = sampler.sample(2, init=x, sigma_start=0.5, method="heun", progress=False)
    assert started.shape == x.shape
    with pytest.raises(ValueError, match="output='np' is of images with a data_range"):
        sampler.sample(1, output="np", progress=False)


# Labels ------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """Exact noise prediction for classes with means -0.5, 0 and 0.5; class 3 is no class."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, sigma, labels):
        self.calls.append(len(x))
        mean = column((labels.float() - 1) / 2 * (labels < 3), x)
        return -(denoised(x, column(sigma, x), mean, 0.1) - x) / column(sigma, x)


def labelled():
    return ncsn_fast.wrap(
        Labelled(), predicts="epsilon", sees="sigma", image_shape=(1, 2, 2), data_range=None,
        n_classes=3, n_sigmas=8, n_steps_each=2, **ENDS,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_labels_and_guidance_in_every_method(method):
    """Guidance of weight w moves the exact mean from m to w m, for the classes of these data."""
    sampler = ncsn_fast.Sampler(labelled(), engine="eager")
    classes = torch.tensor([0, 1, 2] * 4)
    options = {"method": method, "progress": False, "seed": 1}
    none = sampler.sample(12, **options)
    x = sampler.sample(12, labels=classes, **options)
    alone = sampler.sample(1, start=2, labels=2, **options)
    loose = method in ("adaptive", "ode", "mala", "hmc")
    torch.testing.assert_close(alone, x[2:3], rtol=0, atol=0.05 if loose else 1e-4)
    guided = sampler.sample(12, labels=classes, guidance=2.0, **options)
    one = sampler.sample(12, labels=classes, guidance=1.0, **options)
    torch.testing.assert_close(one, x, rtol=0, atol=0.05 if loose else 1e-3)
    shift = column((classes.float() - 1) / 2, x)
    for images, moved in ((x, shift), (guided, 2 * shift)):
        assert ((images - none) - moved).flatten(1).mean(dim=1).abs().max() < 0.25


def test_guidance_runs_both_halves_in_one_batch():
    model = labelled()
    sampler = ncsn_fast.Sampler(model, engine="eager", batch_size=4)
    calls = sampler.engine_for(4).replica.net.net.calls
    calls.clear()
    sampler.sample(4, labels=0, guidance=3.0, method="fast", steps=2, progress=False)
    assert set(calls) == {8}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"labels": 3}, ValueError, r"labels must be in \[0, 3\), .*; got 3 .. 3"),
        ({"labels": [0, 1]}, ValueError, r"labels must be an integer or \(4,\); got \(2,\)"),
        ({"labels": 0.5}, TypeError, "labels must be integers"),
        ({"guidance": 2.0}, ValueError, "guidance is towards a class: give labels"),
        ({"labels": 0, "guidance": math.nan}, ValueError, "guidance must be finite"),
    ],
)
def test_labels_that_are_none(options, error, text):
    with pytest.raises(error, match=text):
        ncsn_fast.Sampler(labelled(), engine="eager").sample(4, progress=False, **options)
    with pytest.raises(ValueError, match="this model has no classes"):
        ncsn_fast.Sampler("digits").sample(1, labels=0, progress=False)


# What wrap takes, and what it refuses ------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, kind=lambda f: f):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(1, 1, 3, padding=1), kind

    def forward(self, x):
        return self.kind(self.conv(x))


class Output:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize("kind", [
    pytest.param(Output, id="object"), pytest.param(lambda f: {"sample": f}, id="dict"),
    pytest.param(lambda f: (f, 1), id="tuple"), pytest.param(lambda f: f, id="tensor"),
])  # fmt: skip
def test_outputs_of_every_kind(kind):
    model = ncsn_fast.wrap(Plain(kind), predicts="score", image_shape=(1, 4, 6), **ENDS)
    assert model.score(torch.zeros(2, 1, 4, 6), 0.5).shape == (2, 1, 4, 6)


class Two(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(1, 1, 3, padding=1), scale

    def forward(self, x, t):
        return self.scale * self.conv(x)


class OfOneClass(nn.Module):
    """Takes no label at all."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1, 1)

    def forward(self, x, sigma, labels):
        return x * self.embedding(labels + 1)[:, :, None, None]


class WithFunction(Two):
    def __init__(self, function):
        super().__init__()
        self.function = function


@pytest.mark.parametrize(
    ("net", "options", "error", "text"),
    [
        (lambda x: x, {}, TypeError, "net must be a torch.nn.Module; got function"),
        (Plain(), {"predicts": "noise"}, ValueError, "predicts must be one of score, scaled_score"),
        (Two(), {}, ValueError, "a second parameter 't': say what it is, sees='sigma'"),
        (Two(), {"sees": "time"}, ValueError, "sees='time' needs the process"),
        (Two(), {"sees": "level"}, ValueError, "give sigmas"),
        (Two(), {"sees": "nothing"}, ValueError, r"forward\(x, t\) would be called with x;"),
        (Plain(), {"sees": "sigma"}, ValueError, r"forward\(x\) would be called with x, the noise"),
        (Plain(), {"sigma_max": None}, ValueError, "give sigma_max, the ends of the noise levels"),
        (Plain(), {"image_shape": (0, 4, 4)}, ValueError, "image_shape must be the shape"),
        (
            Plain().half(),
            {},
            ValueError,
            "must be float32.*conv.weight is torch.float16",
        ),
        (Plain(lambda f: f[:, :, 1:]), {}, ValueError, r"returned the shape \(1, 1, 3, 6\) for"),
        (Plain(lambda f: "f"), {}, TypeError, "must return a tensor.*got str"),
        (Plain(lambda f: f.long()), {}, TypeError, "floating-point numbers; got torch.int64"),
        (Plain(), {"predicts": "v"}, ValueError, "predicts='v' is of a VP process"),
        (Plain(), {"data_range": (1.0, 1.0)}, ValueError, "data_range must be two numbers"),
        (Plain(), {"sigma_max": 200.0, "process": VP(), "sees": "sigma"}, ValueError, "forward"),
        (Two(), {"sigma_max": 200.0, "process": VP(), "sees": "time"}, ValueError, "at most 152"),
        (Plain(), {"n_classes": 2}, ValueError, "would be called with x, labels"),
        (OfOneClass(), {"n_classes": 3, "sees": "sigma"}, IndexError, "out of range"),
    ],
)
def test_what_cannot_be_wrapped(net, options, error, text):
    given = {"predicts": "score", "image_shape": (1, 4, 6), **ENDS, **options}
    with pytest.raises(error, match=text):
        ncsn_fast.wrap(net, **given)


def test_a_parameterisation_of_ones_own():
    own = Parameterisation(
        torch.zeros_like, torch.ones_like, torch.ones_like, lambda sigma: 1 / sigma
    )
    net = Exact(own, lambda c: 1 / c)
    model = ncsn_fast.wrap(net, predicts=own, image_shape=(1, 2, 2), data_range=None, **ENDS)
    x = torch.ones(1, 1, 2, 2)
    torch.testing.assert_close(model.denoise(x, 0.5), denoised(x, 0.5))
    with pytest.raises(TypeError, match="functions cannot be written to a file"):
        model.save_pretrained("nowhere")


class ClassesOnly(nn.Module):
    """Noise prediction with one row for each of three classes, and none for no class."""

    def __init__(self, one_hot=False):
        super().__init__()
        self.one_hot = one_hot
        self.embedding = nn.Embedding(3, 1)
        self.embedding.weight.data[:, 0] = torch.tensor([-0.5, 0.0, 0.5])

    def forward(self, x, sigma, labels):
        if self.one_hot:
            mean = (nn.functional.one_hot(labels, 3).float() @ self.embedding.weight)[:, 0]
        else:
            mean = self.embedding(labels)[:, 0]
        sigma = column(sigma, x)
        return -(denoised(x, sigma, column(mean, x), 0.1) - x) / sigma


@pytest.mark.parametrize(
    ("engine", "one_hot"),
    [
        ("eager", False),
        ("eager", True),
        ("cpu", False),
        ("ort", False),
        pytest.param("compile", False, marks=pytest.mark.slow),
    ],
)
def test_networks_that_know_their_classes_only(engine, one_hot, tmp_path):
    """Labels work, nothing runs without them, and guidance says what it lacks."""
    model = ncsn_fast.wrap(
        ClassesOnly(one_hot), predicts="epsilon", sees="sigma", image_shape=(1, 2, 2),
        data_range=None, n_classes=3, n_sigmas=8, n_steps_each=2, **ENDS,
    )  # fmt: skip
    sampler = ncsn_fast.Sampler(model, engine=engine, device="cpu", dtype="fp32", batch_size=3)
    options = {"method": "dpmpp", "steps": 20, "eta": 0.0, "progress": False}
    x = sampler.sample(3, labels=[0, 2, 1], **options)
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.tensor([-0.5, 0.5, 0.0]), rtol=0, atol=0.2)
    words = "takes one of its 3 classes and not the label 3, .* give labels, or give its embedding"
    for call in (
        lambda: sampler.sample(3, **options),
        lambda: sampler.score(x, 0.5),
        lambda: sampler.denoise(x, 0.5),
        lambda: sampler.log_likelihood(x.clamp(0, 1)),
        lambda: model.score(x, 0.5),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match=r"does not take the label 3, .* leave guidance out"):
        sampler.sample(3, labels=0, guidance=2.0, **options)
    assert model.score(x, 0.5, torch.tensor([0, 1, 2])).shape == x.shape
    folder = model.save_pretrained(tmp_path / "model")
    assert not ncsn_fast.load(folder, net=ClassesOnly(one_hot)).config.no_class


class TableOfTimes(nn.Module):
    """Looks its timestep up in a table, and so takes whole ones only."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(1000, 1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x + self.table(t)[:, :, None, None])


@pytest.mark.parametrize("engine", ["eager", "cpu", "ort"])
def test_networks_of_whole_timesteps(engine, tmp_path):
    torch.manual_seed(0)
    options = {"predicts": "epsilon", "sees": "timestep", "image_shape": (1, 4, 6), "n_sigmas": 4}
    net = TableOfTimes()
    with pytest.raises(ValueError, match="takes whole timesteps only: give process=Dis") as raised:
        ncsn_fast.wrap(net, process=DiscreteVP(betas="cosine"), **options)
    process = DiscreteVP(betas="cosine", rounded=True)
    assert str(raised.value).endswith(f"give process={process}")
    model = ncsn_fast.wrap(net, process=process, **options)
    x, sigma = torch.rand(2, 1, 4, 6), float(process.sigmas[70])
    expected = -net(x / math.hypot(1, sigma), torch.tensor([70, 70])) / sigma
    sampler = ncsn_fast.Sampler(model, engine=engine, dtype="fp32", device="cpu")
    torch.testing.assert_close(
        sampler.score(x, sigma), expected.detach(), rtol=1e-4, atol=1e-4 / sigma
    )
    assert sampler.sample(2, method="fast", progress=False).isfinite().all()
    folder = model.save_pretrained(tmp_path / "model")
    again = ncsn_fast.load(folder, net=TableOfTimes())
    assert torch.equal(again.score(x, sigma), model.score(x, sigma))


# Files -------------------------------------------------------------------------------------------


def test_weights_parameterisation_and_ladder_are_saved(tmp_path):
    torch.manual_seed(1)
    options = {"predicts": "v", "sees": "time", "process": VP(), "time_scale": 999.0}
    model = ncsn_fast.wrap(Two(), image_shape=(1, 4, 6), data_range=(-1, 1), n_sigmas=9, **options)
    folder = model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"files run no code.*load\(folder, net=\.\.\.\)"):
        ncsn_fast.load(folder)
    loaded = ncsn_fast.load(folder, net=Two())
    x = torch.rand(2, 1, 4, 6)
    assert torch.equal(loaded.score(x, 0.7), model.score(x, 0.7))
    assert torch.equal(loaded.sigmas, model.sigmas)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.digest() == model.digest()
    with pytest.raises(CheckpointError, match=r"conv.weight has shape \(1, 1, 3, 3\); expected"):
        ncsn_fast.load(folder, net=Signal())
    with pytest.raises(CheckpointError, match="the weights do not fit network 'Points': missing"):
        ncsn_fast.load(folder, net=Points())
    digits = ncsn_fast.load("digits").save_pretrained(tmp_path / "digits")
    with pytest.raises(CheckpointError, match="of this package; load it without net="):
        ncsn_fast.load(digits, net=Two())


def test_numbers_of_numpy_are_taken_and_written(tmp_path):
    shape = tuple(map(np.int64, (3, 8, 8)))
    numbers = {"sigma_max": np.float32(1), "n_sigmas": np.int16(4), "n_steps_each": np.int64(2)}
    numbers |= {"epsilon": np.float32(0.5), "time_scale": np.float64(2), "n_classes": np.int8(0)}
    process = VP(beta_max=np.float32(10))
    net = nn.Conv2d(3, 3, 1)

    def wrap(**options):
        common = {"predicts": "epsilon", "sees": "nothing", "image_shape": shape}
        return ncsn_fast.wrap(net, process=process, **common, **options)

    model = wrap(**numbers)
    described = json.loads(json.dumps(model.config.to_dict()))
    assert described["parameterisation"]["process"]["beta_max"] == 10.0
    assert described["n_steps_each"] == 2
    assert len(model.digest()) == 64
    with pytest.raises(ValueError, match="n_steps_each must be an integer from 0 on; got True"):
        wrap(**{**numbers, "n_steps_each": True})
    with pytest.raises(ValueError, match="epsilon must be a positive number; got nan"):
        wrap(**{**numbers, "epsilon": np.float32("nan")})


def test_samplers_of_wrapped_models_can_be_pickled():
    sampler = ncsn_fast.Sampler(shaped("points"), engine="eager")
    expected = sampler.sample(2, method="fast", progress=False)
    again = pickle.loads(pickle.dumps(sampler)).sample(2, method="fast", progress=False)
    assert torch.equal(again, expected)


def test_digests_tell_networks_apart():
    """Equal weights are not enough: code and settings decide what a network computes."""

    def digest(net):
        torch.nn.init.zeros_(net.conv.weight)
        torch.nn.init.zeros_(net.conv.bias)
        options = {"predicts": "score", "sees": "sigma", "image_shape": (1, 4, 6), **ENDS}
        return ncsn_fast.wrap(net, **options).digest()

    assert digest(Two(1.0)) == digest(Two(1.0))
    assert digest(Two(2.0)) != digest(Two(1.0))
    assert digest(WithFunction(abs)) != digest(WithFunction(abs))  # functions cannot be compared
