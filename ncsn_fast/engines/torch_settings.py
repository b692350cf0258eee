"""Settings of torch that a call of an engine changes, so that calls in several threads do not mix.

The number of CPU threads belongs to the calling thread (OpenMP's own setting), and is changed for
that thread alone. The float32 precision of cuDNN belongs to the process: it is changed under a lock
that a thread holds for one evaluation of a network, and no callback runs inside.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ncsn_fast.ops.extension import _C

PROCESS_SETTINGS = threading.RLock()  # held while a setting of the process is changed


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Sets the CPU threads of the calling thread (None: unchanged); restores the old number after.

    `torch.set_num_threads` would also change the number that new threads of the process start with.
    """
    if threads is None:
        yield
        return
    before = torch.get_num_threads()  # the first call in a thread sets it, so it comes first
    _set_threads(threads)
    try:
        yield
    finally:
        _set_threads(before)


def _set_threads(threads: int) -> None:
    _C.set_num_threads(threads)
    if torch.get_num_threads() != threads:  # a torch with another OpenMP runtime than ours
        torch.set_num_threads(threads)


@contextlib.contextmanager
def cudnn_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Sets the float32 precision of cuDNN and of Triton convolutions: "ieee" or "tf32".

    Other devices than GPUs have no such setting, and change nothing.
    """
    if device.type != "cuda":
        yield
        return
    # Not allow_tf32: reading it raises if the caller has set its successor, fp32_precision.
    places: Any = torch.backends.cudnn, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with PROCESS_SETTINGS:
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = precision
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.fp32_precision = value


@contextlib.contextmanager
def compiler_settings(*, freezing: bool, shapes: int) -> Iterator[None]:
    """Sets whether torch.compile freezes weights, and the number of shapes that it compiles."""
    import torch._dynamo.config
    import torch._inductor.config

    limits = {"recompile_limit": shapes, "accumulated_recompile_limit": shapes}
    shared = contextlib.nullcontext() if _compiler_settings_are_per_thread() else PROCESS_SETTINGS
    with (
        shared,
        torch._dynamo.config.patch(limits),
        torch._inductor.config.patch(freezing=freezing),
    ):
        yield


@functools.cache
def _compiler_settings_are_per_thread() -> bool:
    """Returns whether a thread's settings of torch.compile are its own, as they are since 2.13."""
    import torch._dynamo.config as config

    seen: list[int] = []
    with PROCESS_SETTINGS, config.patch(recompile_limit=config.recompile_limit + 1):
        thread = threading.Thread(target=lambda: seen.append(config.recompile_limit))
        thread.start()
        thread.join()
        return seen != [config.recompile_limit]


def to_channels_last(module: nn.Module) -> None:
    """Converts weights (O, I, kH, kW) to channels-last; those of other shapes stay."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
