"""Execution contexts: check shapes and addresses like TensorRT, then compute on the CPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from tensorrt_double import graph
from tensorrt_double.behaviour import Call
from tensorrt_double.logs import Log

CHECK = "Parameter check failed, condition:"
INVALID_NAME = "Given invalid tensor name: {}. Get valid tensor names with getIOTensorName()"
DEFAULT_STREAM = (
    "Using default stream in enqueueV3() may lead to performance issues due to additional calls to "
    "cudaStreamSynchronize() by TensorRT to ensure correct synchronization. Please use non-default "
    "stream instead."
)


class IExecutionContext:
    facade = "IExecutionContext"
    stored = ("engine", "name", "debug_sync", "enqueue_emits_profile", "persistent_cache_limit",
              "nvtx_verbosity")  # fmt: skip

    def __init__(self, api: Any, log: Log, engine: Any, strategy: Any) -> None:
        self._api, self._log, self.engine = api, log, engine
        self.name, self.debug_sync, self.enqueue_emits_profile = "", False, True
        self.persistent_cache_limit = 0
        self.nvtx_verbosity = api.member(f"ProfilingVerbosity.{engine._plan.verbosity}")
        self.active_optimization_profile = 0
        self._needed = engine.device_memory_size_v2
        self._memory: int | None = None if strategy.name == "USER_MANAGED" else -1
        self._addresses: dict[str, int] = {}
        self._calls: list[Call] = []
        self._forget_shapes()

    def _forget_shapes(self) -> None:
        inputs = self.engine._inputs.values()
        self._shapes = {one.name: tuple(one.shape) for one in inputs if not one.open}

    def _fail(self, where: str, text: str, code: int = 3) -> bool:
        self._log.error(f"IExecutionContext::{where}", text, code)
        return False

    def _sizes(self) -> dict[str, int] | None:
        """Returns sizes by name; None if two inputs disagree."""
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for size, given in zip(self.engine._inputs[name].dims, shape, strict=True):
                if isinstance(size, str) and sizes.setdefault(size, given) != given:
                    seen = f"Condition '==' violated: {sizes[size]} != {given}."
                    text = f"Dimensions with name {size} must be equal. {seen}"
                    self._fail("inferShapes", text, 4)
                    return None
        return sizes

    @property
    def all_binding_shapes_specified(self) -> bool:
        return set(self._shapes) == set(self.engine._inputs)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            text = "profileIndex >= 0 && profileIndex < mEngine.getNbOptimizationProfiles()"
            self._fail("setOptimizationProfileAsync", f"{CHECK} {text}")
            raise RuntimeError("Error in set optimization profile async.")
        if profile_index != self.active_optimization_profile:
            self.active_optimization_profile = profile_index
            self._forget_shapes()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        where, shape = "setInputShape", [int(size) for size in shape]
        if name not in self.engine._inputs:
            return self._fail(where, INVALID_NAME.format(name))
        own = self.engine._inputs[name].shape
        low, _, high = self.engine._range(name, self.active_optimization_profile)
        fits = len(own) == len(shape) and all(
            fixed in (-1, given) for fixed, given in zip(own, shape, strict=True)
        )
        if not fits:
            text = f"Static dimension mismatch while setting input shape for {name}. Set dimensions"
            text += f" are {shape}. Expected dimensions are {own}."
            return self._fail(where, f"{CHECK} engineDims.d[i] == dims.d[i]. {text}")
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            text = f"Set dimension {shape} for tensor {name} does not satisfy any optimization "
            text += f"profiles. Valid range for profile {self.active_optimization_profile}: "
            return self._fail(where, f"{CHECK} satisfyProfile. {text}{low}..{high}.")
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Any:
        dims = self._api.names["Dims"]
        if name not in self.engine._io:
            self._fail("getTensorShape", INVALID_NAME.format(name))
            return dims([])
        if name in self._shapes:
            return dims(self._shapes[name])
        own = self.engine._io[name]
        found = graph.concrete(own.dims, self._sizes() or {})
        return dims(found if found and name in self.engine._outputs else own.shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._io:
            return self._fail("setTensorAddress", INVALID_NAME.format(name))
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        needed = self._needed
        if size < needed:
            self._fail("setDeviceMemoryV2", f"{CHECK} size >= {needed}; got {size}")
        else:
            self._memory = memory

    def update_device_memory_size_for_shapes(self) -> int:
        """Returns the bytes for the current shapes, at most the engine's."""
        used = max(math.prod(shape) for shape in self._shapes.values())
        self._needed = min(16 * 4 * used, self.engine.device_memory_size_v2)
        return self._needed

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self.engine._inputs if name not in self._shapes]
        if not missing and self._sizes() is None:
            raise RuntimeError("inferShapes error")
        return missing

    def execute_async_v3(self, stream_handle: int) -> bool:
        if stream_handle == 0:
            self._log.warning(DEFAULT_STREAM)
        ok = self._ready() and self._compute()
        shapes = dict(self._shapes)
        self._calls.append(Call(stream_handle, self.active_optimization_profile, shapes,
                                dict(self._addresses), ok))  # fmt: skip
        return ok

    def _ready(self) -> bool:
        where, engine = "enqueueV3", self.engine
        if not self.all_binding_shapes_specified:
            names = ", ".join(name for name in engine._inputs if name not in self._shapes)
            text = "Not all shapes are specified. Following input tensors' dimensions are not"
            condition = "inputDimensionSpecified && inputShapesSpecified."
            return self._fail(where, f"{CHECK} {condition} {text} specified: {names}.")
        if self._sizes() is None:
            return False
        for name in engine._io:
            if not self._addresses.get(name):
                kind = "input" if name in engine._inputs else "output"
                text = f"Address is not set for {kind} tensor {name}. Call "
                text += f"set{kind.title()}TensorAddress or setTensorAddress"
                return self._fail(where, f"{text} before enqueue/execute.")
        if self._memory is None:
            return self._fail(where, "No device memory was set for a USER_MANAGED context.")
        if self._api.behaviour.fail_run:
            return self._fail(where, "Cuda Runtime (an illegal memory access was encountered)", 1)
        return True

    def _compute(self) -> bool:
        engine = self.engine
        feeds = {name: self._array(name, self._shapes[name]).copy() for name in engine._inputs}
        results = engine._session.run([*engine._outputs], feeds)
        for name, result in zip(engine._outputs, results, strict=True):
            error = np.asarray(self._api.behaviour.output_error, result.dtype)
            self._array(name, result.shape)[...] = result + error
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the memory at a tensor's address as an array."""
        dtype = np.dtype(graph.NUMPY[self.engine._io[name].dtype])
        n_bytes = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * n_bytes).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
