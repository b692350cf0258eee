"""IBuilderConfig, optimisation profiles and timing caches."""

from __future__ import annotations

import json
from typing import Any

from tensorrt_double.logs import Log

CACHE_MAGIC = b"timing-cache-double\0"
MAX_LEVEL = 5
UNLIMITED = 80 << 30  # bytes of the GPU, the default limit of the workspace


class IHostMemory:
    """Memory that is accessible only through the buffer protocol, without slices or length."""

    facade = "IHostMemory"

    def __init__(self, api: Any, content: bytes) -> None:
        self._content = content
        self.dtype = api.member("DataType.INT8")
        self.nbytes = len(content)


class IOptimizationProfile:
    facade = "IOptimizationProfile"

    def __init__(self, api: Any, log: Log) -> None:
        self._log = log
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> list[Any]:
        if input not in self._shapes:
            self._log.error(
                "IOptimizationProfile::getDimensions",
                f"Cannot get dimensions for input: {input}. Input is not present in this "
                "OptimizationProfile",
            )
            return []
        return [self._log.api.names["Dims"](shape) for shape in self._shapes[input]]

    def __bool__(self) -> bool:
        for name, (low, opt, high) in self._shapes.items():
            ordered = all(a <= b <= c for a, b, c in zip(low, opt, high, strict=False))
            if not (len(low) == len(opt) == len(high) and ordered and min(low, default=0) >= 0):
                self._log.error(
                    "IOptimizationProfile::isValid",
                    f"Invalid optimization profiles for input tensors {name}, please ensure that "
                    "the optimization profiles satisfy MIN<=OPT<=MAX.",
                )
                return False
        return True


class ITimingCache:
    """Timings by layer, for one version and one GPU."""

    facade = "ITimingCache"

    def __init__(self, api: Any, gpu: str, entries: set[str]) -> None:
        self._api, self._gpu, self._entries = api, gpu, entries

    def serialize(self) -> IHostMemory:
        content = [self._api.record["version"], self._gpu, sorted(self._entries)]
        return IHostMemory(self._api, CACHE_MAGIC + json.dumps(content).encode())

    def reset(self) -> bool:
        self._entries.clear()
        return True

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if self._gpu != input_cache._gpu and not ignore_mismatch:
            return False
        self._entries |= input_cache._entries
        return True


def read_cache(api: Any, content: bytes, log: Log) -> ITimingCache:
    """Reads a cache; damaged bytes, or another version's, give an empty one and a warning.

    TensorRT-RTX 1.7 does the same with damaged bytes.
    """
    empty = ITimingCache(api, api.behaviour.gpu, set())
    if not content:
        return empty
    try:
        if not content.startswith(CACHE_MAGIC):
            raise ValueError("magic")
        version, gpu, entries = json.loads(content[len(CACHE_MAGIC) :])
        if version != api.record["version"]:
            raise ValueError("version")
    except ValueError:
        log.warning("The timing cache will not be used!")
        log.warning("Failed to deserialize timing cache. Returning an empty timing cache.")
        return empty
    return ITimingCache(api, gpu, set(entries))


class IBuilderConfig:
    facade = "IBuilderConfig"
    stored = ("avg_timing_iterations", "max_num_tactics", "profiling_verbosity",
              "hardware_compatibility_level", "progress_monitor", "engine_capability",
              "tiling_optimization_level", "profile_stream")  # fmt: skip

    def __init__(self, api: Any, log: Log) -> None:
        self._api, self._log = api, log
        self.reset()

    def reset(self) -> None:
        api = self._api
        self.flags = 1 << int(api.member("BuilderFlag.TF32"))
        self.avg_timing_iterations = 1
        self.max_num_tactics = -1
        self.profile_stream = 0
        self.progress_monitor = None
        self.profiling_verbosity = api.member("ProfilingVerbosity.LAYER_NAMES_ONLY")
        self.hardware_compatibility_level = api.member("HardwareCompatibilityLevel.NONE")
        self.engine_capability = api.member("EngineCapability.STANDARD")
        self.tiling_optimization_level = api.member("TilingOptimizationLevel.NONE")
        self._level, self._aux = 3, -1
        self._limits: dict[str, int] = {"WORKSPACE": UNLIMITED}
        self._cache: ITimingCache | None = None
        self._profiles: list[IOptimizationProfile] = []

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        if level < 0:
            self._log.error(
                "IBuilderConfig::setBuilderOptimizationLevel",
                "Parameter check failed, condition: level >= 0. Setting builder optimization "
                "level. Valid values include integers from 0 to the n, where n is the required "
                "optimization level", 3,
            )  # fmt: skip
        else:
            self._level = min(level, MAX_LEVEL)

    @property
    def max_aux_streams(self) -> int:
        return self._aux

    @max_aux_streams.setter
    def max_aux_streams(self, streams: int) -> None:
        if streams < 0:
            self._log.warning(
                f"nbStreams {streams} should not be negative, "
                f"IBuilderConfig::setMaxAuxStreams({streams}) has no effect."
            )
        else:
            self._aux = streams

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limits[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._limits.get(pool.name, 0)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile:
            self._log.error(
                "IBuilderConfig::addOptimizationProfile",
                "Parameter check failed, condition: profile->isValid(). ", 3,
            )  # fmt: skip
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        return read_cache(self._api, bytes(serialized_timing_cache), self._log)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._gpu != self._api.behaviour.gpu and not ignore_mismatch:
            self._log.error(
                "IBuilderConfig::setTimingCache",
                f"Timing cache was created on {cache._gpu}, not on {self._api.behaviour.gpu}", 3,
            )  # fmt: skip
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def _on(self, name: str) -> bool:
        """Returns whether a flag is set; false for flags that this version lacks."""
        members = self._api.record["enums"]["BuilderFlag"]["members"]
        return name in members and bool(self.flags >> members[name] & 1)
