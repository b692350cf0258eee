"""Runner: which errors count as a full GPU, and what those of the caller's functions do."""

from __future__ import annotations

import pytest
import torch
from drawing import draw, tiny

from ncsn_fast import Sampler
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.samplers.operators import Operator

WORDS = ("CUDA out of memory", "failed to allocate a licence", "unable to find an engine")


@pytest.mark.parametrize("method", ["ald", "pc", "ode"])
@pytest.mark.parametrize(
    "error", [*map(RuntimeError, WORDS), torch.OutOfMemoryError("of the caller's own")], ids=str
)
def test_a_callback_s_exception_comes_through_unchanged_and_once(method, error):
    sampler, calls = Sampler(tiny(), engine="eager", batch_size=4), []

    def callback(progress):
        calls.append(progress.level)
        raise error

    with pytest.raises(type(error)) as caught:
        draw(sampler, 4, method=method, callback=callback)
    assert caught.value is error
    assert calls == [0]
    assert sampler.batch_size == 4


@pytest.mark.parametrize("words", WORDS)
def test_an_engine_s_full_memory_halves_the_micro_batch_beside_a_callback(words, monkeypatch):
    sampler, calls = Sampler(tiny(), engine="eager", batch_size=4), []
    expected = draw(Sampler(sampler.model, engine="eager", batch_size=2), 4)
    network = EagerEngine.network

    def run(engine, x, level):
        if len(x) > 2 and calls:  # after the first level
            raise RuntimeError(words)
        return network(engine, x, level)

    monkeypatch.setattr(EagerEngine, "network", run)
    images = draw(sampler, 4, callback=lambda progress: calls.append(progress.level))
    assert torch.equal(images, expected)
    assert sampler.batch_size == 2
    assert calls == [0, *range(5), *range(5)]


class OwnGuide:
    """A guide of the caller, for any number of samples."""

    def __init__(self, n, act):
        self.n, self.act = n, act

    def __len__(self):
        return self.n

    def rows(self, index, device):
        return OwnGuide(len(index), self.act)

    def score(self, score, x, sigma):
        found = score(x, sigma)
        self.act(x)
        return found


class OwnOperator(Operator):
    """An operator of the caller: the images themselves."""

    def __init__(self, act):
        self.act = act

    def apply(self, x):
        self.act(x)
        return x

    def adjoint(self, y):
        return y

    def solve(self, r, damping=0.0):
        return r


def classifier(act):
    def logits(x, sigma):
        act(x)
        return x.flatten(1)[:, :3]

    return logits


def gradient(act):
    def grad(x, sigma, labels):
        act(x)
        return torch.zeros_like(x)

    return grad


# Calls that use a function of the caller, which does act(x).
USES = {
    "guide": lambda s, act, **o: s.sample(4, guide=OwnGuide(4, act), **o),
    "classifier": lambda s, act, **o: s.guided([0, 1, 2, 0], classifier(act), **o),
    "gradient": lambda s, act, **o: s.guided([0, 1, 2, 0], gradient=gradient(act), **o),
    "projected": lambda s, act, **o: s.restore(
        torch.zeros(4, 3, 8, 8), OwnOperator(act), how="projected", **o
    ),
    "imposed": lambda s, act, **o: s.restore(
        torch.zeros(4, 3, 8, 8), OwnOperator(act), how="imposed", **o
    ),
}
CASES = [(u, m) for u in USES for m in ("ald", "pc", "ode") if (u, m) != ("imposed", "ode")]


@pytest.mark.parametrize(("use", "method"), CASES)
def test_words_of_the_caller_s_functions_are_no_full_memory(use, method):
    sampler, calls = Sampler(tiny(), engine="eager", batch_size=4), []
    error = RuntimeError(WORDS[0])

    def act(x):
        if x.any():  # checks before the first micro-batch are made with zeros
            calls.append(0)
            raise error

    with pytest.raises(RuntimeError) as caught:
        USES[use](sampler, act, method=method, progress=False)
    assert caught.value is error
    assert len(calls) == 1
    assert sampler.batch_size == 4


@pytest.mark.parametrize("use", USES)
def test_a_full_memory_beside_or_within_the_caller_s_functions_halves_the_micro_batch(
    use, monkeypatch
):
    """The engine says it in words, also below a guide; torch, in a guide, by the type of error."""
    model, network, calls = tiny(), EagerEngine.network, []

    def count(x):
        if x.any():
            calls.append(len(x))

    expected = USES[use](Sampler(model, engine="eager", batch_size=2), count, progress=False)

    def full(engine, x, level):
        if len(x) > 2:
            raise RuntimeError(WORDS[0])
        return network(engine, x, level)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "network", full)
        sampler = Sampler(model, engine="eager", batch_size=4)
        assert torch.equal(USES[use](sampler, count, progress=False), expected)
        assert sampler.batch_size == 2

    def hungry(x):
        count(x)
        if calls == [4]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    calls.clear()
    sampler = Sampler(model, engine="eager", batch_size=4)
    assert torch.equal(USES[use](sampler, hungry, progress=False), expected)
    assert (sampler.batch_size, calls[:2]) == (2, [4, 2])
