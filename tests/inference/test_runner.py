"""Runner: which errors count as a full GPU, and what a callback's exception does."""

from __future__ import annotations

import pytest
import torch
from drawing import draw, tiny

from ncsn_fast import Sampler
from ncsn_fast.engines.eager import EagerEngine

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
