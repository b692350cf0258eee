"""What callers give a model: errors that say what was expected, what came, and what to do."""

import pytest
import tiny
import torch

import ncsn_fast
from ncsn_fast import Sampler


class Half(torch.nn.Module):
    def forward(self, x):
        return x[:, :, 1:]


class Lost(torch.nn.Module):
    def forward(self, x):
        return None


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, engine="eager")


X = torch.rand(2, 1, 8, 8)
TENSORS = {
    "list": ([1.0, 2.0], TypeError, "x must be a tensor; got list: convert it, torch.tensor"),
    "array": (X.numpy(), TypeError, "x must be a tensor; got ndarray"),
    "uint8": ((X * 255).byte(), TypeError, r"must be floating point.* got torch.uint8.* by 255"),
    "integers": (X.long(), TypeError, "must be floating point, .* got torch.int64"),
    "complex": (X.cfloat(), TypeError, "must be floating point, .* got torch.complex64"),
    "one image": (X[0], ValueError, r"expected images \(N, 1, H, W\); got \(1, 8, 8\)"),
    "colours": (X.expand(2, 3, 8, 8), ValueError, r"expected images \(N, 1, H, W\); got \(2, 3, 8"),
}
FOR_THE_NETWORK = {
    "float64": (
        X.double(),
        TypeError,
        r"dtype, torch.float32; got torch.float64: convert it, x.to",
    ),
    "float16": (X.half(), TypeError, "dtype, torch.float32; got torch.float16"),
    "device": (X.to("meta"), ValueError, "x is on meta, and the network on cpu: move one of"),
}


@pytest.mark.parametrize("case", [*TENSORS, *FOR_THE_NETWORK])
@pytest.mark.parametrize("call", ["score", "denoise", "score_at"])
def test_states_that_a_network_cannot_take(model, call, case):
    x, kind, words = {**TENSORS, **FOR_THE_NETWORK}[case]
    with pytest.raises(kind, match=words):
        getattr(model, call)(x, 1)


@pytest.mark.parametrize("case", TENSORS)
def test_states_that_a_sampler_cannot_take(sampler, case):
    """It moves and converts those that a network of another place and dtype would refuse."""
    x, kind, words = TENSORS[case]
    with pytest.raises(kind, match=words):
        sampler.score(x, 1.0)


def test_states_of_any_dtype_and_place_that_is_the_networks(model):
    assert model.double().score(X.double(), 1.0).dtype == torch.float64
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.score(X.bfloat16(), 1.0).isfinite().all()


def test_noise_levels_and_labels(model):
    for sigma in (None, "high"):
        with pytest.raises(TypeError, match=r"sigma must be a number or a tensor \(2,\); got "):
            model.score(X, sigma)
    with pytest.raises(TypeError, match=r"level must be an integer .* got torch.float32"):
        model.score_at(X, 1.5)
    with pytest.raises(ValueError, match="this model has no classes, so labels say nothing"):
        model.score(X, 1.0, torch.tensor([0, 1]))


def wrapped(net, **changes):
    given = {"predicts": "score", "sees": "nothing", "image_shape": (1, 8, 8), **changes}
    return ncsn_fast.wrap(net, sigma_min=0.1, sigma_max=1.0, **given)


class Classes(torch.nn.Module):
    def forward(self, x, sigma, labels):
        return x * (1 + labels[:, None, None, None])


def test_labels_of_a_network_with_classes():
    model = wrapped(Classes(), sees="sigma", n_classes=3)
    assert model.score(X, 1.0, torch.tensor([0, 3])).shape == X.shape
    with pytest.raises(TypeError, match=r"labels must be a tensor \(2,\) of torch.int64; got list"):
        model.score(X, 1.0, [0, 1])
    with pytest.raises(TypeError, match=r"of torch\.int64; got torch\.float32"):
        model.score(X, 1.0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels must be \(2,\), one for each image; got \(3,\)"):
        model.score(X, 1.0, torch.tensor([0, 1, 2]))


def test_networks_of_users(tmp_path):
    with pytest.raises(TypeError, match=r"is a class: build it, net=Half\(...\)"):
        wrapped(Half)
    with pytest.raises(
        ValueError, match=r"returned the shape \(1, 1, 7, 8\) for samples \(1, 1, 8"
    ):
        wrapped(Half())
    with pytest.raises(TypeError, match=r"must return a tensor, .* got NoneType"):
        wrapped(Lost())
    with pytest.raises(RuntimeError, match="to have 3 channels") as raised:
        wrapped(torch.nn.Conv2d(3, 3, 1))
    (note,) = raised.value.__notes__
    assert "called with x (1, 1, 8, 8) torch.float32: if it takes others, give wrap" in note
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match=r"expected images \(N, 1, H, W\); got \(2, 3, 8, 8\)"):
        wrapped(net).score(torch.rand(2, 3, 8, 8), 1.0)
    folder = wrapped(net).save_pretrained(tmp_path / "own")
    with pytest.raises(TypeError, match=r"is a class: build it, net=Conv2d\(...\)"):
        ncsn_fast.load(folder, net=torch.nn.Conv2d)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got function"):
        ncsn_fast.load(folder, net=lambda x: x)
    with pytest.raises(TypeError, match="got the class Half"):
        Sampler(Half)


CALLS = {
    "guide": (lambda s: s.sample(1, guide=3), TypeError, "a guide is one of .* got int"),
    "mask": (lambda s: s.inpaint(X, "left"), ValueError, "mask must be an array .* got 'left'"),
    "no mask": (lambda s: s.inpaint(X, None), ValueError, "mask must be an array .* got None"),
    "operator": (lambda s: s.restore(X, 3), TypeError, "operator must be one of .* got int"),
    "indices": (lambda s: s.stream("abc"), TypeError, r"samples must be integer .* got 'abc'"),
    "classes": (lambda s: s.guided("a", len), TypeError, r"labels must be integers .* got 'a'"),
    "device": (
        lambda s: Sampler(s.model, device="gpu"),
        ValueError,
        "device must be cpu, .*gpu",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_of_a_sampler(sampler, case):
    act, kind, words = CALLS[case]
    with pytest.raises(kind, match=words):
        act(sampler)
