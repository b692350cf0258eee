"""TensorRT plans at run time: deserialised, inspected, refitted, and run on static memory."""

from __future__ import annotations

import dataclasses
import json
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.engines.base import EngineError, PrecisionError
from ncsn_fast.engines.cuda.kernels import Kernels
from ncsn_fast.engines.cuda.loop import Vectors
from ncsn_fast.engines.lowering.static_memory import network_input
from ncsn_fast.engines.tensorrt.api import checked, create, get_logger

_ANEW = "clear the cache with `ncsn-fast cache clear`, or export the plan anew on this machine"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a built engine, as reported by its inspector.

    Attributes:
        kind: TensorRT's name of it.   nodes: names of the ONNX nodes that it computes.
        dtype: "fp32", "fp16" or "bf16": that of its weights, else of its kernel's inputs, else of
            its first input unless it casts that; None if nothing is reported.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    dtype: str | None

    def __str__(self) -> str:
        return f"{self.kind:24} {self.dtype or '-':6} {self.name}"


class TrtNetwork:
    """A deserialised plan, shared by contexts of several sizes.

    A plan is native code: the caller must have verified its origin.

    Raises:
        EngineError: TensorRT refuses the plan.   EngineUnavailable: there is no working driver.
    """

    def __init__(self, trt: ModuleType, plan: bytes) -> None:
        self._trt, self._log = trt, get_logger(trt)
        self._log.errors.clear()
        self._runtime = create(trt.Runtime, self._log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        self.engine = checked(engine, "refuses this plan", self._log, _ANEW)
        self.weight_bytes = len(plan)

    @property
    def memory(self) -> int:
        """Bytes of maps of a context with the largest shapes."""
        return int(self.engine.device_memory_size_v2)

    @property
    def launches(self) -> int:
        return int(self.engine.num_layers)

    def new_context(self, inputs: dict[str, Tensor], output: Tensor) -> tuple[Any, Tensor]:
        """Returns a context that reads these tensors and writes f, and the memory of its maps.

        The memory is torch's, sized for these shapes: less than for the largest ones, as far as the
        layers can do with less.
        """
        log, device = self._log, output.device
        log.errors.clear()
        tensors = {**inputs, "f": output}
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        if names != set(tensors):
            raise EngineError(f"this plan has tensors {sorted(names)}, not {sorted(tensors)}")
        ours = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self.engine.create_execution_context(ours)
        context = checked(made, "cannot make an execution context", log, "free GPU memory")
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        handle = 0 if stream is None else stream.cuda_stream
        try:
            context.set_optimization_profile_async(0, handle)
        except RuntimeError as error:  # it never returns False
            words = f"TensorRT does not take its own profile: {log.reasons()}; {_ANEW}"
            raise EngineError(words) from error
        if stream is not None:
            stream.synchronize()
        for name, tensor in inputs.items():
            shape = tuple(tensor.shape)
            taken = context.set_input_shape(name, shape)
            checked(taken, f"was not built for {name} {shape}", log, "build it for those")
        for name, tensor in tensors.items():
            taken = context.set_tensor_address(name, tensor.data_ptr())
            checked(taken, f"does not take a buffer for {name}", log, _ANEW)
        size = context.update_device_memory_size_for_shapes()
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        context.set_device_memory(memory.data_ptr(), memory.nbytes)
        if log.errors:  # neither of the two calls reports it
            raise EngineError(f"TensorRT takes no memory for its maps: {log.reasons()}; {_ANEW}")
        # Detailed layer information in NVTX would make every call slower.
        context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
        return context, memory

    def execute(self, context: Any, stream: int) -> None:
        """Queues a run of a context on a CUDA stream."""
        remedy = "if CUDA graphs are the reason, pass graph='none'"
        checked(context.execute_async_v3(stream), "could not run", self._log, remedy)

    def refit(self, onnx: bytes) -> None:
        """Replaces the weights by those of an ONNX model of the same structure.

        Raises:
            EngineError: the engine was not built for that, or the model has another structure.
        """
        remedy, log = "build a plan of this model", self._log
        try:
            refitter = self._trt.Refitter(self.engine, log)
        except TypeError as error:
            raise EngineError(f"TensorRT cannot refit: {log.reasons()}; {remedy}") from error
        parser = self._trt.OnnxParserRefitter(refitter, log)
        checked(parser.refit_from_bytes(onnx), "cannot refit with these weights", log, remedy)
        checked(refitter.refit_cuda_engine(), "could not refit", log, remedy)

    def serialize(self) -> bytes:
        """Returns the plan with its current weights, refittable if it was."""
        config, flags = self.engine.create_serialization_config(), self._trt.SerializationFlag
        config.clear_flag(flags.EXCLUDE_WEIGHTS)
        if self.engine.refittable:
            config.set_flag(flags.INCLUDE_REFIT)
        plan = self.engine.serialize_with_config(config)
        return bytes(checked(plan, "cannot serialise", self._log, _ANEW))

    def layers(self, context: Any = None) -> list[Layer]:
        """Lists the layers of the plan, without details if it was built without.

        With a context, at its shapes.
        """
        inspector = self.engine.create_engine_inspector()
        if context is not None:
            inspector.execution_context = context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        found = json.loads(text).get("Layers", [])
        return [_layer(entry) for entry in found]


def check_types(layers: list[Layer], dtype: str) -> tuple[int, int]:
    """Returns how many convolutions are known to compute in a dtype, and how many there are.

    Raises:
        PrecisionError: one computes in another dtype, which strong typing should exclude.
    """
    expected = {"tf32": "fp32"}.get(dtype, dtype)
    # In bfloat16 graphs, transposed ones are float32 (engines/onnx/network.py).
    kinds = {"Conv"} if dtype == "bf16" else {"Conv", "ConvTranspose"}
    ours = [layer for layer in layers if any(_operator(node) in kinds for node in layer.nodes)]
    for layer in ours:
        if layer.dtype not in (None, expected):
            raise PrecisionError(
                f"TensorRT computes {layer.name} in {layer.dtype} instead of {dtype}; please "
                "report its version, and use engine='cuda'"
            )
    return sum(layer.dtype is not None for layer in ours), len(ours)


def _operator(node: str) -> str:
    """Returns the operator in a node's name: Conv of "net.res1.0.conv1/Conv_2"."""
    return node.rpartition("/")[2].partition("_")[0]


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", (), None)
    # "[ONNX Layer: a]\x1f[ONNX Layer: b]", or \x1e between two
    marked = (part.strip() for part in re.split("[\x1e\x1f]", entry.get("Metadata", "")))
    nodes = tuple(
        part.removeprefix("[ONNX Layer:").removesuffix("]").strip() for part in marked if part
    )
    casts = any(_operator(node) == "Cast" for node in nodes)
    dtype = _dtype(entry, inputs=not casts)
    return Layer(entry.get("Name", ""), entry.get("LayerType", ""), nodes, dtype)


def _dtype(entry: dict[str, Any], *, inputs: bool) -> str | None:
    """Returns the dtype of a layer's weights, else of its kernel's name, else of its input."""
    weights = entry.get("Weights")
    told = [weights.get("Type", "")] if isinstance(weights, dict) else []
    # "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc": both operands are f16.
    kernel = re.search(r"_(bf16|tf32|f16|f32)(?:bf16|tf32|f16|f32)_", entry.get("TacticName", ""))
    told += [kernel[1]] if kernel else []
    told += [port.get("Format/Datatype", "") for port in entry.get("Inputs", ())[:1] if inputs]
    return next((known for known in map(_type, told) if known), None)


def _type(text: str) -> str | None:
    """Converts an inspector's dtype ("Half", "Row major linear FP16 format", ...) to our name.

    None for others, such as "N/A due to dynamic shapes".
    """
    words = text.lower()
    for name, spellings in (
        ("bf16", ("bfloat16", "bf16")),
        ("fp16", ("half", "fp16", "float16", "f16")),
        ("fp32", ("float", "fp32", "tf32", "f32")),
    ):
        if any(spelling in words for spelling in spellings):
            return name
    return None


class TrtPlan:
    """An engine on buffers for a micro-batch of one shape: a cuda.loop.LoopPlan.

    Input and output are contiguous float32. Its own context has a shape and addresses that never
    change, so that CUDA graphs of it stay valid.

    Args:
        shape: (N, C, H, W).
        takes_sigma: whether the network has the noise level as an input.
        default_label: of images without one; None for networks without classes.
    """

    def __init__(
        self,
        network: TrtNetwork,
        shape: tuple[int, int, int, int],
        takes_sigma: bool,
        default_label: int | None,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self.batch, self.device, self.kernels = shape[0], device, kernels
        self.conditional, self.default_label = takes_sigma, default_label
        self.vectors: Vectors | None = None
        self.input, self.output = (torch.zeros(shape, device=device) for _ in range(2))
        self.level = torch.zeros(self.batch, device=device)
        self.labels: Tensor | None = None
        inputs = {"x": self.input}
        if takes_sigma:
            inputs["sigma"] = self.level
        if default_label is not None:
            self.labels = torch.full((self.batch,), default_label, device=device)
            inputs["labels"] = self.labels
        self._network = network
        self.context, self._maps = network.new_context(inputs, self.output)
        # TensorRT waits for the GPU after every call on the default stream.
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def launches(self) -> int:
        return self._network.launches

    @property
    def weight_bytes(self) -> int:
        return self._network.weight_bytes

    @property
    def map_bytes(self) -> int:
        buffers = (self.input, self.output, self.level, self.labels, self._maps)
        return sum(tensor.nbytes for tensor in buffers if tensor is not None)

    def load(self, x: Tensor, scale: float, shift: float) -> None:
        """Sets input = scale * x + shift, as a sampler update does."""
        self.input.copy_(network_input(x, scale, shift))

    def run(self) -> None:
        """Computes `output` from `input` and `level`, on the current stream or ordered with it."""
        if self._side_stream is None:
            return self._network.execute(self.context, 0)
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            return self._network.execute(self.context, current.cuda_stream)
        self._side_stream.wait_stream(current)
        self._network.execute(self.context, self._side_stream.cuda_stream)
        current.wait_stream(self._side_stream)
