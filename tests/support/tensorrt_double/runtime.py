"""Runtime, engines and execution contexts: load plans and compute them on the CPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tensorrt_double import graph, plan
from tensorrt_double.builder import start
from tensorrt_double.config import IHostMemory
from tensorrt_double.context import INVALID_NAME, IExecutionContext
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
            text = "stdMagicTagRead == kMAGIC_TAG failed. Magic tag does not match"
            self._log.error(DESERIALIZE, f"Serialization assertion {text}", 1, "Serialization")
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


class ISerializationConfig:
    facade = "ISerializationConfig"

    def __init__(self, api: Any) -> None:
        self._api, self.flags = api, 0

    def set_flag(self, flag: Any) -> bool:
        self.flags |= 1 << int(flag)
        return True

    def clear_flag(self, flag: Any) -> bool:
        self.flags &= ~(1 << int(flag))
        return True

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)


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
        """Returns sixteen maps of the largest input's size, which grows like the real number."""
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
            self._log.error(
                "IExecutionContext::IExecutionContext", "Requested amount of GPU memory "
                f"({self.device_memory_size_v2} bytes) could not be allocated.", 2, "OutOfMemory",
            )  # fmt: skip
            return None
        return IExecutionContext(self._api, self._log, self, strategy)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._api, self)

    def serialize(self) -> IHostMemory:
        return self.serialize_with_config(ISerializationConfig(self._api))

    def create_serialization_config(self) -> ISerializationConfig:
        return ISerializationConfig(self._api)

    def serialize_with_config(self, arg0: ISerializationConfig) -> IHostMemory:
        """Serialises the engine, refittable only if requested."""
        kept = self._plan.refittable and arg0.get_flag(
            self._api.member("SerializationFlag.INCLUDE_REFIT")
        )
        plan = dataclasses.replace(self._plan, refittable=kept)
        return IHostMemory(self._api, plan.to_bytes())

    def _known(self, name: str, where: str) -> bool:
        if name not in self._io:
            self._log.error(f"ICudaEngine::{where}", INVALID_NAME.format(name), 3)
        return name in self._io

    def _range(self, name: str, profile: int) -> list[list[int]]:
        """Returns min, opt and max of an input; for a fixed shape, that shape."""
        fixed = [self._inputs[name].shape] * 3
        return self._plan.profiles[profile].get(name, fixed) if self._plan.profiles else fixed
