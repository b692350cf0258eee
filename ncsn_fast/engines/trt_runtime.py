"""A TensorRT plan at work: deserialised, inspected, refitted, and run on static memory."""

from __future__ import annotations

import dataclasses
import json
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.engines.base import EngineError
from ncsn_fast.engines.gpu_kernels import Kernels
from ncsn_fast.engines.trt_api import checked, create, new_log

_KINDS = {"level": torch.int64, "time": torch.float32}  # of what networks are conditioned on
_ANEW = "clear the cache with `ncsn-fast cache clear`, or export the plan anew on this machine"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a built engine, as its inspector tells it.

    Attributes:
        kind: TensorRT's name of it.   nodes: names of the ONNX nodes that it computes.
        types: "fp32", "fp16", "bf16" or what else its maps are, inputs before outputs.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    types: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind:24} {' '.join(dict.fromkeys(self.types)) or '-':12} {self.name}"


class TrtNetwork:
    """A deserialised plan, which contexts of several sizes share.

    A plan is native code: whoever calls this has made sure where it is from.

    Raises:
        EngineError: TensorRT refuses the plan.   EngineUnavailable: there is no working driver.
    """

    def __init__(self, trt: ModuleType, plan: bytes) -> None:
        self._trt, self._log = trt, new_log(trt)
        self._runtime = create(trt.Runtime, self._log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        self.engine = checked(engine, "refuses this plan", self._log, _ANEW)
        self.weight_bytes = len(plan)

    @property
    def memory(self) -> int:
        """Bytes of maps of a context."""
        return int(self.engine.device_memory_size_v2)

    @property
    def launches(self) -> int:
        return int(self.engine.num_layers)

    def new_context(self, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> Any:
        """A context that reads and writes these tensors, inputs having these shapes."""
        failed, remedy = "cannot make an execution context", "free GPU memory"
        context = checked(self.engine.create_execution_context(), failed, self._log, remedy)
        for name, shape in shapes.items():
            taken = context.set_input_shape(name, shape)
            checked(taken, f"was not built for {name} {shape}", self._log, "build it for those")
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        if names != set(tensors):
            raise EngineError(f"this plan has tensors {sorted(names)}, not {sorted(tensors)}")
        for name, tensor in tensors.items():
            taken = context.set_tensor_address(name, tensor.data_ptr())
            checked(taken, f"does not take a buffer for {name}", self._log, _ANEW)
        return context

    def execute(self, context: Any, stream: int) -> None:
        """Queues a run of a context on a CUDA stream."""
        remedy = "if CUDA graphs are the reason, pass graph='none'"
        checked(context.execute_async_v3(stream), "could not run", self._log, remedy)

    def refit(self, onnx: bytes) -> None:
        """Puts the weights of an ONNX model of the same structure into the engine.

        EngineError: it was not built for that, or the model is another one.
        """
        remedy, log = "build a plan of this model", self._log
        try:
            refitter = self._trt.Refitter(self.engine, log)
        except TypeError as error:
            raise EngineError(f"TensorRT cannot refit: {log.reasons()}; {remedy}") from error
        parser = self._trt.OnnxParserRefitter(refitter, log)
        checked(parser.refit_from_bytes(onnx), "cannot refit with these weights", log, remedy)
        checked(refitter.refit_cuda_engine(), "could not refit", log, remedy)

    def layers(self) -> list[Layer]:
        """What the plan computes, layer by layer; without details if it was built without."""
        inspector = self.engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        found = json.loads(text).get("Layers", [])
        return [_layer(entry) for entry in found]


def check_types(layers: list[Layer], dtype: str) -> int:
    """The number of convolutions seen, all of them on maps of the type.

    EngineError: TensorRT computes one in another type, which strong typing should exclude.
    """
    low = {"tf32": "fp32"}.get(dtype, dtype)
    # Transposed ones are float32 in bfloat16 graphs (engines/onnx_network.py).
    ours = [layer for layer in layers if any(_is_convolution(node) for node in layer.nodes)]
    for layer in ours:
        if layer.types and low not in layer.types:
            raise EngineError(
                f"TensorRT computes {layer.name} in {' and '.join(dict.fromkeys(layer.types))} "
                f"instead of {dtype}; please report its version, and use engine='cuda'"
            )
    return len(ours)


def _is_convolution(node: str) -> bool:
    return node.rpartition("/")[2].partition("_")[0] == "Conv"


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", (), ())
    # "[ONNX Layer: a]\x1f[ONNX Layer: b]", or \x1e between two
    marked = (part.strip() for part in re.split("[\x1e\x1f]", entry.get("Metadata", "")))
    nodes = tuple(
        part.removeprefix("[ONNX Layer:").removesuffix("]").strip() for part in marked if part
    )
    maps = (*entry.get("Inputs", ()), *entry.get("Outputs", ()))
    types = tuple(_type(x.get("Format/Datatype", "")) for x in maps)
    return Layer(entry.get("Name", ""), entry.get("LayerType", ""), nodes, types)


def _type(text: str) -> str:
    """Our name of a type in the inspector's words: "Half", "Row major linear FP16 format", ..."""
    words = text.lower()
    for name, spellings in (
        ("bf16", ("bfloat16", "bf16")),
        ("fp16", ("half", "fp16", "float16")),
        ("fp32", ("float", "fp32")),
    ):
        if any(spelling in words for spelling in spellings):
            return name
    return words or "unknown"


class TrtPlan:
    """An engine on buffers for a micro-batch of one shape: cuda_loop.LoopPlan.

    Contiguous float32 in and out. It has a context of its own, whose shape and addresses never
    change, so that CUDA graphs of it stay valid.

    Args:
        shape: (N, C, H, W).   conditioning: "none", "level" or "time".
    """

    def __init__(
        self,
        network: TrtNetwork,
        shape: tuple[int, int, int, int],
        conditioning: str,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self.batch, self.device, self.kernels = shape[0], device, kernels
        self.conditional = conditioning in _KINDS
        self.input, self.output = (torch.zeros(shape, device=device) for _ in range(2))
        kind = _KINDS.get(conditioning, torch.int64)
        self.level = torch.zeros(self.batch, dtype=kind, device=device)
        inputs = {"x": self.input, **({conditioning: self.level} if self.conditional else {})}
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        self._network = network
        self._context = network.new_context(shapes, {**inputs, "f": self.output})
        # TensorRT waits for the GPU after every call on the default stream.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def launches(self) -> int:
        return self._network.launches

    @property
    def weight_bytes(self) -> int:
        return self._network.weight_bytes

    @property
    def map_bytes(self) -> int:
        buffers = (self.input, self.output, self.level)
        return self._network.memory + sum(tensor.nbytes for tensor in buffers)

    def load(self, x: Tensor, scale: float, shift: float) -> None:
        """input = scale * x + shift."""
        self.input.copy_(x * scale + shift)

    def run(self) -> None:
        """Computes `output` from `input` and `level`, on the current stream or in step with it."""
        if self._side is None:
            return self._network.execute(self._context, 0)
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            return self._network.execute(self._context, current.cuda_stream)
        self._side.wait_stream(current)
        self._network.execute(self._context, self._side.cuda_stream)
        current.wait_stream(self._side)
