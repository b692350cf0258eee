"""Settings of a whole process or call, that engines heed and put back."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

# Whether builds that take long show progress.
progress_shown: contextvars.ContextVar[bool] = contextvars.ContextVar("progress", default=True)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Runs with this many CPU threads (None: leave them), and puts the old number back."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
