"""Builder: compiles a network and a configuration to a plan, or logs a reason and returns None."""

from __future__ import annotations

import hashlib
from typing import Any

from tensorrt_double import graph
from tensorrt_double.config import IBuilderConfig, IHostMemory, IOptimizationProfile
from tensorrt_double.logs import Log, call
from tensorrt_double.parser import INetworkDefinition
from tensorrt_double.plan import Plan

NO_DRIVER = "CUDA initialization failure with error: 35. Please check your CUDA installation"
NULL = "pybind11::init(): factory function returned nullptr"
WHERE = "IBuilder::buildSerializedNetwork"
FLAGS = {"TF32", "REFIT", "EDITABLE_TIMING_CACHE", "DISABLE_TIMING_CACHE", "FP16", "BF16",
         "DISABLE_COMPILATION_CACHE", "MONITOR_MEMORY"}  # fmt: skip
PHASES = (  # build phases: name, parent, steps
    ("Building engine", None, 3),
    ("Cloning network graph", "Building engine", 2),
    ("Building engine from subgraph", "Building engine", 2),
    ("Computing profile costs", "Building engine from subgraph", 2),
    ("Timing tactics", "Computing profile costs", 0),  # one step per layer
)


class Cancelled(Exception):
    """Error for a build whose monitor's step_complete returned False."""


class Refused(Exception):
    """Error of a failed build: the text, code and kind that are logged."""


def start(api: Any, logger: Any) -> Log:
    """Starts Builder or Runtime; without a driver, logs and fails."""
    log = Log(api, logger)
    if not api.behaviour.driver:
        log.write("ERROR", NO_DRIVER)
        raise TypeError(NULL)
    return log


class Builder:
    facade = "Builder"
    stored = ("logger", "max_threads")

    def __init__(self, api: Any, logger: Any) -> None:
        self._api, self.logger, self.max_threads = api, logger, 1
        self._log = start(api, logger)

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(self._api, self, flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._api, self._log)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile(self._api, self._log)

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return bool(network.num_outputs)

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        try:
            profiles = check(self._api, network, config)
            report(config.progress_monitor, network.num_layers)
            compile_layers(self._api, network, config)
        except Cancelled:
            self._log.error(WHERE, "Build canceled by user", 7, "BuildCanceled")
            return None
        except Refused as error:
            self._log.error(WHERE, *error.args)
            return None
        self._api.behaviour.n_builds += 1
        return IHostMemory(self._api, self._plan(network, config, profiles).to_bytes())

    def _plan(self, network: Any, config: Any, profiles: list[Any]) -> Plan:
        behaviour = self._api.behaviour
        return Plan(
            version=self._api.record["version"], gpu=behaviour.gpu,
            capability=behaviour.capability,
            compatibility=config.hardware_compatibility_level.name, name=network.name,
            typed=strongly_typed(self._api, network), refittable=config._on("REFIT"),
            tf32=config._on("TF32"), verbosity=config.profiling_verbosity.name,
            float_convolution=behaviour.float_convolution, profiles=profiles,
            onnx=network._content,
        )  # fmt: skip


def strongly_typed(api: Any, network: INetworkDefinition) -> bool:
    """Returns whether a network is strongly typed: always in 11, by a flag in 10."""
    flag = int(api.member("NetworkDefinitionCreationFlag.STRONGLY_TYPED"))
    return api.version.startswith("11") or bool(network.flags >> flag & 1)


def check(api: Any, network: INetworkDefinition, config: IBuilderConfig) -> list[Any]:
    """Returns the profiles of a network that can be built; raises Refused otherwise."""
    if not network.num_outputs:
        raise Refused("Network must have at least one output.")
    unknown = [
        name
        for name, value in api.record["enums"]["BuilderFlag"]["members"].items()
        if config.flags >> value & 1 and name not in FLAGS
    ]
    if unknown:
        raise NotImplementedError(f"the double of TensorRT builds without {', '.join(unknown)}")
    if strongly_typed(api, network) and (config._on("FP16") or config._on("BF16")):
        raise Refused(
            "Parameter check failed, condition: !(config.getFlag(BuilderFlag::kFP16) || "
            "config.getFlag(BuilderFlag::kBF16)). Precision flags are not allowed in strongly "
            "typed networks.", 3,
        )  # fmt: skip
    inputs = [graph.value(info) for info in network._model.graph.input]
    if any(one.open for one in inputs) and not config._profiles:
        raise Refused(
            "Network has dynamic or shape inputs, but no optimization profile has been defined."
        )
    for index, profile in enumerate(config._profiles):
        opt_sizes: dict[str, int] = {}
        for one in inputs:
            check_profile(one, profile._shapes.get(one.name), index, opt_sizes)
    return [profile._shapes for profile in config._profiles]


def check_profile(
    one: graph.Value, shapes: list[list[int]] | None, index: int, opt_sizes: dict[str, int]
) -> None:
    """Raises Refused if a profile contradicts an input; of named sizes, only kOPT is compared."""
    if shapes is None:
        if one.open:
            raise Refused(
                f"Dynamic input tensor {one.name} is missing dimensions in profile {index}."
            )
        return
    if len(shapes[0]) != len(one.dims):
        raise Refused(
            f"Dynamic-shaped input tensor {one.name} has {len(one.dims)} dimensions but profile "
            f"{index} has {len(shapes[0])} dimensions."
        )
    for kind, shape in zip(("kMIN", "kOPT", "kMAX"), shapes, strict=True):
        if not one.open and shape != one.shape:
            own, given = (str(sizes).replace(" ", "") for sizes in (one.shape, shape))
            raise Refused(
                f"Input tensor {one.name} has static dimensions that don't match {kind} dimensions "
                f"in profile index {index}. Input dimensions are {own} but profile dimensions are "
                f"{given}."
            )
    for axis, size in enumerate(one.dims):
        low, opt, high = (shape[axis] for shape in shapes)
        if isinstance(size, int) and {low, opt, high} != {size}:
            raise Refused(
                f"Dimension mismatch for tensor {one.name} and profile {index}. At dimension axis "
                f"{axis}, profile has min={low}, opt={opt}, max={high} but tensor has {size}."
            )
        if isinstance(size, str) and opt_sizes.setdefault(size, opt) != opt:
            raise Refused(
                f"Profile kOPT values are not self-consistent. Dimensions with name {size} must "
                f"be equal. Condition '==' violated: {opt_sizes[size]} != {opt}.",
                4, "Internal Error",
            )  # fmt: skip


def report(monitor: Any, n_layers: int, phase: int = 0) -> None:
    """Reports the nested phases, from one on, to a monitor; raises Cancelled."""
    if monitor is None or phase == len(PHASES):
        return
    name, parent, steps = PHASES[phase]
    children = [i for i, (_, above, _) in enumerate(PHASES) if above == name]
    steps = steps or n_layers
    call(monitor.phase_start, "phase_start", name, parent, steps)
    try:
        for step in range(steps):
            if step < len(children):
                report(monitor, n_layers, children[step])
            if not call(monitor.step_complete, "step_complete", name, step, default=False):
                raise Cancelled
    finally:
        call(monitor.phase_finish, "phase_finish", name)


def compile_layers(api: Any, network: INetworkDefinition, config: IBuilderConfig) -> None:
    """Chooses tactics, which fails without workspace and fills the timing cache."""
    if api.behaviour.fail_build:
        raise Refused("Could not find any implementation for node Conv.", 10, "Internal Error")
    if config._limits["WORKSPACE"] < api.behaviour.needs_workspace:
        raise Refused(
            "[tactic.cpp:1676: enumerate_tactics] Tactic Selection: no tactics to implement the "
            "operation within workspace limit. Consider increase the allowed workspace size if "
            "applicable.", 1, "Myelin",
        )  # fmt: skip
    level = config.builder_optimization_level  # level 0 does not use the cache
    if config._cache is not None and level and not config._on("DISABLE_TIMING_CACHE"):
        shapes = [profile._shapes for profile in config._profiles]
        for node in network._model.graph.node:
            key = f"{node.op_type} {list(node.output)} {shapes} {level}"
            config._cache._entries.add(hashlib.sha256(key.encode()).hexdigest()[:16])
