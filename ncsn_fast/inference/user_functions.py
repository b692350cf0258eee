"""Functions of the caller within a sampling call, whose errors are told from those of the engine.

An engine that runs out of GPU memory may say so in words only, and the call then goes on with
smaller micro-batches. The same words in an error of a callback, guide, classifier or operator are
the caller's own: they end the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ncsn_fast.samplers.constraints import Constraint
from ncsn_fast.samplers.procedure import Guide, Score

_WORDS = ("out of memory", "outofmemory", "failed to allocate", "unable to find an engine")


class UserFunctions:
    """Watches the caller's functions during a micro-batch.

    Attributes:
        raised: the error that one of them raised, or None.
        of_callback: whether it was the callback.
    """

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self.of_callback = False

    @contextlib.contextmanager
    def watch(self, callback: bool = False) -> Iterator[None]:
        """Runs a block that calls a function of the caller."""
        try:
            yield
        except BaseException as error:
            self.raised, self.of_callback = error, callback
            raise

    def out_of_memory(self, error: RuntimeError) -> bool:
        """Returns whether an error means that smaller micro-batches may fit into the GPU's memory.

        Some libraries say so only in their message. Of the caller's functions only torch's own
        error counts, as guides compute on a micro-batch; of the callback none, as it would be
        called a second time.
        """
        theirs = error is self.raised
        if isinstance(error, torch.OutOfMemoryError):
            return not (theirs and self.of_callback)
        return not theirs and any(words in str(error).lower() for words in _WORDS)

    def guide(self, guide: Guide, rows: Tensor, device: torch.device) -> Guide:
        """Returns the watched guide of some rows (B,)."""
        with self.watch():
            return _WatchedGuide(guide.rows(rows, device), self)

    def constraint(self, constraint: Constraint, rows: Tensor, device: torch.device) -> Constraint:
        """Returns the watched constraint of some rows (B,)."""
        with self.watch():
            return _WatchedConstraint(constraint.rows(rows, device), self)


class _WatchedGuide:
    """Guide whose own errors are noted; those of the score that it is given are the engine's."""

    def __init__(self, guide: Guide, watching: UserFunctions) -> None:
        self._guide, self._watching = guide, watching

    def __len__(self) -> int:
        return len(self._guide)

    def rows(self, index: Tensor, device: torch.device) -> Guide:
        return self._watching.guide(self._guide, index, device)

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        failed: BaseException | None = None

        def network(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal failed
            try:
                return score(x, sigma)
            except BaseException as error:
                failed = error
                raise

        try:
            return self._guide.score(network, x, sigma)
        except BaseException as error:
            if error is not failed:
                self._watching.raised = error
            raise
        finally:
            failed = None  # it would keep itself, and with it all tensors of its frames


class _WatchedConstraint:
    """Constraint whose errors are noted."""

    def __init__(self, constraint: Constraint, watching: UserFunctions) -> None:
        self._constraint, self._watching = constraint, watching

    def rows(self, index: Tensor, device: torch.device) -> Constraint:
        return self._watching.constraint(self._constraint, index, device)

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        with self._watching.watch():
            return self._constraint.impose(x, sigma, z)
