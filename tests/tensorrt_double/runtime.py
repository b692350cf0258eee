"""Runtime, engines and execution contexts: plans loaded, and computed on the CPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from tensorrt_double import graph, plan
from tensorrt_double.behaviour import Call
from tensorrt_double.builder import start
from tensorrt_double.config import IHostMemory
from tensorrt_double.inspector import EngineInspector
from tensorrt_double.logs import Log

DESERIALIZE = "IRuntime::deserializeCudaEngine"


class Runtime:
    facade = "Runtime"
    stored = ("logger", "max_threads")

    def __init__(self, api: Any, logger: Any) -> None:
        self._api, self.logger, self.max_threads = api, logger, 1
        self._log = start(api, logger)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        if not content:
            self._log.error(DESERIALIZE, "Cannot deserialize with an empty memory buffer.", 3)
            return None
        found = plan.read(content)
        if found is None:
            text = "Serialization assertion stdMagicTagRead == kMAGIC_TAG failed. Magic tag does not match"
            self._log.error(DESERIALIZE, text, 1, "Serialization")
            return None
        ours, behaviour = self._api.record["version"], self._api.behaviour
        if found.version != ours:
            self._log.error(
                DESERIALIZE,
                "The engine plan file is not compatible with this version of TensorRT, expecting "
                f"library version {ours} got {found.version}, please rebuild.", 6,
            )  # fmt: skip
            return None
        ampere = found.compatibility == "AMPERE_PLUS" and float(behaviour.capability) >= 8
        if found.capability != behaviour.capability and not ampere:
            self._log.error(
                DESERIALIZE,
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{behaviour.capability} got compute {found.capability}, please rebuild.", 6,
            )  # fmt: skip
            return None
        if found.gpu != behaviour.gpu and found.compatibility == "NONE":
            self._log.warning(
                "Using an engine plan file across different models of devices is not recommended "
                "and is likely to affect performance or even cause errors."
            )
        return ICudaEngine(self._api, self._log, found)


class ICudaEngine:
    facade = "ICudaEngine"
    other_version = ("device_memory_size",)

    def __init__(self, api: Any, log: Log, made: plan.Plan) -> None:
        self._api, self._log, self._plan = api, log, made
        self._load(made.onnx)

    def _load(self, content: bytes) -> None:
        model = graph.parse(content)
        assert model is not None
        self._content, self._model = content, model
        self._session = graph.session(content)
        self._inputs = {one.name: graph.value(one) for one in model.graph.input}
        self._outputs = {one.name: graph.value(one) for one in model.graph.output}
        self._io = {**self._inputs, **self._outputs}

    @property
    def name(self) -> str:
        return self._plan.name

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    @property
    def num_layers(self) -> int:
        return len(EngineInspector(self._api, self)._layers())

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._plan.profiles))

    @property
    def refittable(self) -> bool:
        return self._plan.refittable

    @property
    def profiling_verbosity(self) -> Any:
        return self._api.member(f"ProfilingVerbosity.{self._plan.verbosity}")

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._api.member(f"HardwareCompatibilityLevel.{self._plan.compatibility}")

    @property
    def num_aux_streams(self) -> int:
        return 0

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2,
                       range(self.num_optimization_profiles)))  # fmt: skip

    @property
    def device_memory_size(self) -> int:
        return self.device_memory_size_v2

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Sixteen maps of the largest input's size, a number that grows as the real one does."""
        largest = (math.prod(self._range(one, profile_index)[2]) for one in self._inputs)
        return 16 * 4 * max(largest)

    def __getitem__(self, arg0: int) -> str:
        return self.get_tensor_name(arg0) or ""

    def get_tensor_name(self, index: int) -> str | None:
        return [*self._io][index] if 0 <= index < len(self._io) else None

    def get_tensor_mode(self, name: str) -> Any:
        kind = "INPUT" if name in self._inputs else "OUTPUT" if name in self._outputs else "NONE"
        return self._api.member(f"TensorIOMode.{kind}")

    def get_tensor_dtype(self, name: str) -> Any:
        if not self._known(name, "getTensorDataType"):
            return self._api.member("DataType.FLOAT")
        return self._api.member(f"DataType.{self._io[name].dtype}")

    def get_tensor_shape(self, name: str) -> Any:
        known = self._known(name, "getTensorShape")
        return self._api.names["Dims"](self._io[name].shape if known else [])

    def get_tensor_location(self, name: str) -> Any:
        return self._api.member("TensorLocation.DEVICE")

    def get_tensor_format_desc(self, name: str) -> str:
        return "Row major linear FP32 format (kLINEAR)"

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        if name not in self._inputs or not 0 <= profile_index < self.num_optimization_profiles:
            self._log.error(
                "ICudaEngine::getProfileShape", f"{name} is no input of profile {profile_index}", 3
            )
            return [self._api.names["Dims"]([])] * 3
        return [self._api.names["Dims"](one) for one in self._range(name, profile_index)]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
        if self._api.behaviour.fail_context:
            self._log.error("IExecutionContext::IExecutionContext", "Requested amount of GPU memory "
                            "could not be allocated. There may not be enough free memory.",
                            2, "OutOfMemory")  # fmt: skip
            return None
        return IExecutionContext(self._api, self._log, self, strategy)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._api, self)

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._api, self._plan.to_bytes())

    def _known(self, name: str, where: str) -> bool:
        if name not in self._io:
            text = f"Given invalid tensor name: {name}. Get valid tensor names with getIOTensorName()"
            self._log.error(f"ICudaEngine::{where}", text, 3)
        return name in self._io

    def _range(self, name: str, profile: int) -> list[list[int]]:
        """min, opt and max of an input; its own shape where that is fixed."""
        own = self._inputs[name].shape
        return self._plan.profiles[profile].get(name, [own] * 3) if self._plan.profiles else [own] * 3


class IExecutionContext:
    facade = "IExecutionContext"
    stored = ("engine", "name", "debug_sync", "enqueue_emits_profile", "persistent_cache_limit")

    def __init__(self, api: Any, log: Log, engine: ICudaEngine, strategy: Any) -> None:
        self._api, self._log, self.engine = api, log, engine
        self.name, self.debug_sync, self.enqueue_emits_profile = "", False, True
        self.persistent_cache_limit = 0
        self.active_optimization_profile = 0
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
        """Sizes by name; None where two inputs disagree."""
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for size, given in zip(self.engine._inputs[name].dims, shape, strict=True):
                if isinstance(size, str) and sizes.setdefault(size, given) != given:
                    self._fail("inferShapes", f"Dimensions with name {size} must be equal. "
                               f"Condition '==' violated: {sizes[size]} != {given}.", 4)  # fmt: skip
                    return None
        return sizes

    @property
    def all_binding_shapes_specified(self) -> bool:
        return set(self._shapes) == set(self.engine._inputs)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._fail("setOptimizationProfileAsync", "Parameter check failed, condition: "
                              "profileIndex >= 0 && profileIndex < mEngine.getNbOptimizationProfiles()")  # fmt: skip
        if profile_index != self.active_optimization_profile:
            self.active_optimization_profile = profile_index
            self._forget_shapes()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        where, shape = "setInputShape", [int(size) for size in shape]
        if name not in self.engine._inputs:
            return self._fail(where, f"Given invalid tensor name: {name}. Get valid tensor names with getIOTensorName()")
        own = self.engine._inputs[name].shape
        low, _, high = self.engine._range(name, self.active_optimization_profile)
        fits = len(own) == len(shape) and all(
            fixed in (-1, given) for fixed, given in zip(own, shape, strict=True)
        )
        if not fits:
            return self._fail(where, "Parameter check failed, condition: engineDims.d[i] == "
                              f"dims.d[i]. Static dimension mismatch while setting input shape for {name}. "
                              f"Set dimensions are {shape}. Expected dimensions are {own}.")  # fmt: skip
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail(where, "Parameter check failed, condition: satisfyProfile. Set "
                              f"dimension {shape} for tensor {name} does not satisfy any optimization profiles. Valid range "
                              f"for profile {self.active_optimization_profile}: {low}..{high}.")  # fmt: skip
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Any:
        dims = self._api.names["Dims"]
        if name not in self.engine._io:
            self._fail("getTensorShape", f"Given invalid tensor name: {name}.")
            return dims([])
        if name in self._shapes:
            return dims(self._shapes[name])
        found = graph.concrete(self.engine._io[name].dims, self._sizes() or {})
        return dims(found if found and name in self.engine._outputs else self.engine._io[name].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._io:
            return self._fail("setTensorAddress", f"Given invalid tensor name: {name}. Get valid tensor names with getIOTensorName()")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self.engine.device_memory_size_v2:
            self._fail("setDeviceMemoryV2", f"size {size} is below {self.engine.device_memory_size_v2}")
        else:
            self._memory = memory

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self.engine._inputs if name not in self._shapes]
        if not missing and self._sizes() is None:
            raise RuntimeError("inferShapes error")
        return missing

    def execute_async_v3(self, stream_handle: int) -> bool:
        ok = self._ready() and self._compute()
        shapes = dict(self._shapes)
        self._calls.append(Call(stream_handle, self.active_optimization_profile, shapes,
                                dict(self._addresses), ok))  # fmt: skip
        return ok

    def _ready(self) -> bool:
        where, engine = "enqueueV3", self.engine
        if not self.all_binding_shapes_specified:
            names = ", ".join(name for name in engine._inputs if name not in self._shapes)
            return self._fail(where, "Parameter check failed, condition: inputDimensionSpecified && "
                              "inputShapesSpecified. Not all shapes are specified. Following input tensors' "
                              f"dimensions are not specified: {names}.")  # fmt: skip
        if self._sizes() is None:
            return False
        for name in engine._io:
            if not self._addresses.get(name):
                kind = "input" if name in engine._inputs else "output"
                return self._fail(where, f"Address is not set for {kind} tensor {name}. Call set{kind.title()}TensorAddress "
                                  "or setTensorAddress before enqueue/execute.")  # fmt: skip
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
        """The memory at a tensor's address as an array."""
        dtype = np.dtype(graph.NUMPY[self.engine._io[name].dtype])
        n_bytes = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * n_bytes).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
