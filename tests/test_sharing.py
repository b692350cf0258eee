"""Samplers in several threads and processes: results as alone, settings of torch as before."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading

import pytest
import torch
from drawing import draw, tiny

from ncsn_fast import Sampler


def process_state():
    """Returns the settings of torch that a call might leave changed, here and in a new thread."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    def settings():
        cudnn = torch.backends.cudnn
        return (
            torch.get_num_threads(), cudnn.fp32_precision, cudnn.conv.fp32_precision,
            cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.get_default_dtype(),
            dynamo.recompile_limit, dynamo.accumulated_recompile_limit, inductor.freezing,
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        )  # fmt: skip

    found = []
    thread = threading.Thread(target=lambda: found.append(settings()))
    thread.start()
    thread.join()
    return settings(), found[0]


class Stop(Exception):
    """Raised by a callback."""


def stop(progress):
    """Callback that ends its call at the second level."""
    if progress.level == 1:
        raise Stop


@pytest.mark.slow
def test_four_threads_with_two_samplers_draw_what_one_draws_and_leave_nothing():
    """With unlike thread counts, calls that a callback ends, and streams that are not finished."""
    of = tiny()
    options = {"dtype": "fp32", "batch_size": 2}
    pair = [
        Sampler(of, engine="eager", threads=2, batch_size=2),
        Sampler(of, engine="cpu", threads=1, **options),
    ]
    expected = [draw(sampler, 5, seed=3) for sampler in pair]
    before, problems, begin = process_state(), [], threading.Barrier(4)

    def work(k):
        sampler, alone = pair[k % 2], torch.get_num_threads()
        begin.wait(60)
        for turn in range(3):
            assert torch.equal(draw(sampler, 5, seed=3), expected[k % 2])
            assert (sampler.report.n, torch.get_num_threads()) == (5, alone)
            with pytest.raises(Stop):
                draw(sampler, 3 + turn, seed=k, callback=stop)
            assert sampler.report is None
            stream = sampler.stream(range(5), seed=3, progress=False)
            assert torch.equal(next(stream)[1], expected[k % 2][:2])
            stream.close()
            assert torch.get_num_threads() == alone

    def run(k):
        try:
            work(k)
        except BaseException as error:  # pytest does not see those of threads
            problems.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert process_state() == before


def test_threads_build_one_engine(monkeypatch):
    """A second thread waits for the first one's build."""
    sampler, built = Sampler(tiny(), engine="eager", batch_size=2), []
    init, begin = sampler.engine_class.__init__, threading.Barrier(4)

    def count(self, *args, **settings):
        built.append(self)
        init(self, *args, **settings)

    monkeypatch.setattr(sampler.engine_class, "__init__", count)
    engines = []

    def run():
        begin.wait(60)
        engines.append(sampler.engine_for(2))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert all(engine is built[0] for engine in engines)


def test_a_report_is_the_calling_thread_s():
    sampler, seen = Sampler(tiny(), engine="eager", batch_size=2), []

    def run():
        seen.append(sampler.report)
        draw(sampler, 3)
        seen.append(sampler.report.n)

    draw(sampler, 1)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None, 3]
    assert sampler.report.n == 1


@pytest.mark.parametrize("engine", ["eager", "cpu"])
@pytest.mark.parametrize("send", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
def test_a_used_sampler_can_be_copied(engine, send):
    sampler = Sampler(tiny(), engine=engine, dtype="fp32", batch_size=2, threads=1)
    images = draw(sampler, 3, seed=4)
    other = send(sampler)
    assert other.report is None
    assert torch.equal(draw(other, 3, seed=4), images)
    assert (other.batch_size, other.threads, other.dtype) == (2, 1, "fp32")
    assert sampler.report.n == 3
    with torch.no_grad():
        sampler.model.net.end_conv.weight.zero_()
    assert torch.equal(draw(send(other), 3, seed=4), images)


@pytest.mark.slow
def test_a_used_sampler_is_sent_to_workers():
    sampler = Sampler(tiny(), engine="cpu", dtype="fp32", batch_size=2, threads=1)
    images = draw(sampler, 4, seed=4)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        parts = [pool.apply(draw, (sampler, 2), {"seed": 4, "start": k}) for k in (0, 2)]
    assert torch.equal(torch.cat(parts), images)
