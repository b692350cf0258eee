"""Settings of torch that calls change: threads do not see each other's, and nothing stays."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ncsn_fast.engines import torch_settings
from ncsn_fast.engines.torch_settings import compiler_settings, cudnn_precision, torch_threads


def in_new_thread(function):
    """Returns what a function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_the_number_of_threads_is_the_calling_thread_s():
    before, fresh = torch.get_num_threads(), in_new_thread(torch.get_num_threads)
    with torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        assert in_new_thread(torch.get_num_threads) == fresh
        with torch_threads(None):
            assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 2):
        raise KeyError
    assert torch.get_num_threads() == before


def test_overlapping_calls_leave_the_number_of_threads_alone():
    """One begins inside the other and ends after it, in a thread that had not used torch yet."""
    before, fresh = torch.get_num_threads(), in_new_thread(torch.get_num_threads)
    inside, ended = threading.Event(), threading.Event()

    def other():
        with torch_threads(7):
            inside.set()
            assert ended.wait(60)
        return torch.get_num_threads()

    found = []
    thread = threading.Thread(target=lambda: found.append(other()))
    with torch_threads(5):
        thread.start()
        assert inside.wait(60)
        assert torch.get_num_threads() == 5
    ended.set()
    thread.join()
    assert found == [fresh]
    assert torch.get_num_threads() == before
    assert in_new_thread(torch.get_num_threads) == fresh


def test_threads_of_torch_are_those_of_the_kernels():
    """Both use one OpenMP runtime, or the count of one thread could not be set alone."""
    before = torch.get_num_threads()
    torch_settings._C.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch_settings._C.set_num_threads(before)


def cudnn_settings():
    """Returns the float32 precision of cuDNN, and of its convolutions."""
    return torch.backends.cudnn.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_precision_of_cudnn_is_set_on_a_gpu_and_put_back(precision):
    before, gpu = cudnn_settings(), SimpleNamespace(type="cuda")
    with cudnn_precision(precision, gpu):
        assert cudnn_settings() == (precision, precision)
        with cudnn_precision("ieee", gpu):
            assert cudnn_settings() == ("ieee", "ieee")
        assert cudnn_settings() == (precision, precision)
    assert cudnn_settings() == before
    with cudnn_precision(precision, torch.device("cpu")):
        assert cudnn_settings() == before


def test_two_precisions_take_turns():
    """What one thread has set holds until it is done, whatever another one asks for."""
    before, gpu, held = cudnn_settings(), SimpleNamespace(type="cuda"), []

    def use(precision):
        for _ in range(10):
            with cudnn_precision(precision, gpu):
                time.sleep(1e-3)  # lets the others run
                held.append(cudnn_settings() == (precision, precision))

    threads = [threading.Thread(target=use, args=(p,)) for p in ("ieee", "tf32") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [True] * 40
    assert cudnn_settings() == before


@pytest.mark.parametrize("per_thread", [True, False])
def test_settings_of_the_compiler_do_not_mix(monkeypatch, per_thread):
    """Also with a torch whose settings belong to the process: there a lock holds others off."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    real = torch_settings._compiler_settings_are_per_thread()
    monkeypatch.setattr(
        torch_settings, "_compiler_settings_are_per_thread", lambda: real and per_thread
    )

    def settings():
        return dynamo.recompile_limit, dynamo.accumulated_recompile_limit, inductor.freezing

    before, held = settings(), []

    def use(shapes):
        for _ in range(10):
            with compiler_settings(freezing=bool(shapes % 2), shapes=shapes):
                time.sleep(1e-3)
                held.append(settings() == (shapes, shapes, bool(shapes % 2)))

    threads = [threading.Thread(target=use, args=(shapes,)) for shapes in (101, 102, 103, 104)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [True] * 40
    assert settings() == before
    assert in_new_thread(settings) == before
