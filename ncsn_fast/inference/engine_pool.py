"""Engines of one model for calls of any size, shared by threads."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ncsn_fast import engines
from ncsn_fast.engines.base import Engine, EngineError
from ncsn_fast.engines.batch_sizes import largest_batch_size
from ncsn_fast.engines.cuda.graphs import empty_cache
from ncsn_fast.models.score import ScoreModel

log = logging.getLogger(__name__)
_KEPT_SIZES = 4  # micro-batch sizes whose engines are kept


class EnginePool:
    """Builds the engine of a model at the first call, and keeps it for a few micro-batch sizes.

    All sizes share their weights. A pool that is pickled or copied leaves its engines behind, and
    builds them again where it arrives.

    Args:
        kind: class of the engine; another one takes its place if it cannot be built and
            `automatic` allows that.
        dtype: None for the fastest that is precise enough.
        batch_size: size of all micro-batches; None for what suits a call.
        threads: CPU threads; None for torch's setting.
        options: the engine's own.
        automatic: whether the engine was chosen by "auto".

    Attributes:
        dtype: the one in use; a guess until an engine is built.
    """

    def __init__(
        self,
        model: ScoreModel,
        kind: type[Engine],
        *,
        device: torch.device,
        dtype: str | None,
        batch_size: int | None,
        threads: int | None,
        options: Mapping[str, Any],
        automatic: bool,
    ) -> None:
        self.model, self.kind, self.device = model, kind, device
        self.batch_size, self.threads = batch_size, threads
        self.dtype = dtype or kind.attempts(device, None, options, threads)[0]["dtype"]
        self._named_dtype, self._options, self._automatic = dtype, options, automatic
        self._halved = False
        self._begin()

    def _begin(self) -> None:
        """Sets what belongs to this process."""
        self._lock = threading.RLock()
        self._engines: OrderedDict[int, Engine] = OrderedDict()  # the last one was used last

    def __getstate__(self) -> dict[str, Any]:
        own = {"_lock", "_engines"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def sizes(self) -> list[int]:
        """Micro-batch sizes whose engines are kept, the one used last at the end."""
        return list(self._engines)

    def micro_batch(self, n: int) -> int:
        """Returns the number of images in a micro-batch of a call for n."""
        if self.batch_size is None and self.kind.caches:
            return self.engine_for(n).batch_size
        return self._size(n)

    def engine_for(self, n: int) -> Engine:
        """Returns the engine for a call for n images; builds and checks it if it is new."""
        with self._lock:
            if not self._engines:
                self._build(self._size(n))
            largest = self._engines[max(self._engines)]
            size = largest.fitting(self._size(n))  # of the engine that could be built
            if size not in self._engines:
                self._engines[size] = largest.resized(size)
            self._engines.move_to_end(size)
            if len(self._engines) > _KEPT_SIZES:
                most = max(self._engines)
                del self._engines[next(kept for kept in self._engines if kept != most)]
            return self._engines[size]

    def shrink(self, engine: Engine, error: Exception) -> Engine:
        """Returns an engine with half the micro-batch when a GPU is out of memory; once only."""
        engine.release()
        empty_cache()
        with self._lock:
            if self._halved and self.batch_size is not None and self.batch_size < engine.batch_size:
                return self.engine_for(0)  # another thread has halved it meanwhile
            size = engine.batch_size // 2
            if self._halved or size == 0 or engine.fitting(size) != size:
                raise EngineError(
                    f"out of GPU memory with micro-batches of {engine.batch_size}; free memory "
                    "that others hold, or choose a smaller batch_size"
                ) from error
            log.warning(
                "out of GPU memory with micro-batches of %d; going on with %d, so choose "
                "batch_size=%d", engine.batch_size, size, size,
            )  # fmt: skip
            self._halved, self.batch_size = True, size
            self._engines = OrderedDict({size: engine.resized(size)})
            return self._engines[size]

    def _size(self, n: int) -> int:
        shape = self.model.image_shape
        return self.batch_size or self.kind.default_batch_size(n, shape, self.device, self._options)

    def _build(self, size: int) -> None:
        """Builds the first engine."""
        if self.batch_size is None and self.kind.caches:
            # What is built once and kept must not depend on the size of the first call.
            size = largest_batch_size(self.model.image_shape, self.device)
        engine = engines.build(
            self.kind,
            self.model,
            self._named_dtype,
            device=self.device,
            options=self._options,
            automatic=self._automatic,
            batch_size=size,
            threads=self.threads,
        )
        if self.batch_size is not None and engine.batch_size != size:
            raise ValueError(
                f"this engine's micro-batches have {engine.batch_size} images at the nearest; "
                f"got batch_size {size}"
            )
        self._engines[engine.batch_size] = engine
        self.kind, self.dtype = type(engine), engine.dtype
