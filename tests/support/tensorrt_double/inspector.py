"""EngineInspector: reports an engine's layers in TensorRT's JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import onnx

from tensorrt_double import graph

FORMATS = {  # names of each type, by kind of layer
    "FLOAT": ("Float", "Row major linear FP32", "Row major linear FP32 format (kLINEAR)"),
    "HALF": ("Half", "Channel major FP16 format where channel % 8 == 0",
             "Row major linear FP16 format"),
    "BF16": ("BFloat16", "Channel major BF16 format where channel % 8 == 0", "BFloat16"),
    "INT64": ("Int64", "Row major linear INT64 format", "Int64"),
    "INT32": ("Int32", "Row major linear INT32 format", "Int32"),
    "BOOL": ("Bool", "Row major linear BOOL", "Bool"),
}  # fmt: skip
TACTIC = {"HALF": "f16f16_f16f32_f16", "BF16": "bf16bf16_bf16f32_bf16",
          "FLOAT": "f32f32_f32f32_f32", "TF32": "tf32tf32_tf32f32_f32"}  # fmt: skip
HIDDEN = "N/A due to dynamic shapes"  # type of maps, if the engine has a profile
CONVOLUTIONS = ("Conv", "ConvTranspose")
FUSED = ("Elu", "Relu", "LeakyRelu")  # fused into the preceding convolution
NO_LAYER = ("Constant", "Identity")
MOST = 4  # other operators per layer


class EngineInspector:
    facade = "EngineInspector"
    stored = ("execution_context",)

    def __init__(self, api: Any, engine: Any) -> None:
        self._api, self._engine = api, engine
        self.execution_context = None

    def get_engine_information(self, format: Any) -> str:
        if format.name != "JSON":
            raise NotImplementedError("the double of TensorRT describes engines as JSON only")
        bindings = [*self._engine._io]
        return json.dumps({"Layers": self._shown(), "Bindings": bindings})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        if format.name != "JSON":
            raise NotImplementedError("the double of TensorRT describes layers as JSON only")
        return json.dumps(self._shown()[layer_index])

    def _shown(self) -> list[Any]:
        layers = self._layers()
        verbosity = self._engine._plan.verbosity
        if verbosity == "NONE":
            return []
        return layers if verbosity == "DETAILED" else [layer["Name"] for layer in layers]

    def _layers(self) -> list[dict[str, Any]]:
        """Returns a reformat, convolutions with their activations, and groups of other operators.

        Every second convolution, and every group, is reported like a Myelin layer: with its own
        name and without parameters.
        """
        made = self._engine._plan
        tensors = graph.values(self._engine._model)
        weights = {one.name for one in self._engine._model.graph.initializer}
        layers: list[dict[str, Any]] = []
        n_convolutions = 0
        for members in groups(self._engine._model):
            node, kind = members[0], None
            if node.op_type in CONVOLUTIONS:
                kind = tensors[node.output[0]].dtype
                if not made.typed or made.float_convolution == n_convolutions + 1:
                    kind = "FLOAT"
                if n_convolutions == 0:
                    layers.append(self._reformat(tensors[node.input[0]], kind))
                n_convolutions += 1
            layer = self._ports(members, tensors, weights, kind, len(layers))
            if kind is None or n_convolutions % 2 == 0:
                name = "".join(one.op_type for one in members)
                layer["Name"] = f"__myl_{name}_myl0_{len(layers)}"
                layer["LayerType"] = "kgen" if kind is None else "conv"
            else:
                layer |= self._cask(node, tensors[node.input[1]], kind)
            layer["TacticName"] = self._tactic(kind) if kind else layer["Name"] + "_0x5a"
            if not self._api.behaviour.tells_types:
                layer["TacticName"] = layer["Name"] + "_0x5a"
                layer.pop("Weights", None)
            layer["StreamId"] = 0
            separator = "\x1f" if kind else "\x1e"
            layer["Metadata"] = separator.join(f"[ONNX Layer: {one.name}]" for one in members)
            layers.append(layer)
        return layers

    def _ports(
        self, members: list[Any], tensors: Any, weights: set[str], kind: str | None, index: int
    ) -> Any:
        """Returns a layer's name, its inputs from other layers and its outputs."""
        inside = {name for one in members for name in one.output}
        taken = [name for one in members for name in one.input if name and name not in inside]
        taken = [name for name in dict.fromkeys(taken) if name not in weights]
        used = {name for one in members for name in one.input}
        given = [name for name in inside if name not in used] or [members[-1].output[0]]
        return {
            "Name": " + ".join(one.name for one in members),
            "LayerType": "",
            "Inputs": [self._port(tensors[name], kind, index) for name in taken],
            "Outputs": [self._port(tensors[name], kind, index + 1) for name in sorted(given)],
        }

    def _reformat(self, tensor: graph.Value, kind: str) -> dict[str, Any]:
        port = self._port(tensor, kind, 0)
        return {
            "Name": f"Reformatting CopyNode for Input Tensor 0 to {tensor.name}",
            "LayerType": "Reformat", "Inputs": [port], "Outputs": [port],
            "ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x00000000000003ea",
            "StreamId": 0, "Metadata": "",
        }  # fmt: skip

    def _cask(self, node: Any, weight: graph.Value, kind: str) -> dict[str, Any]:
        word = "Convolution" if node.op_type == "Conv" else "Deconvolution"
        return {
            "LayerType": f"Cask{word}", "ParameterType": word, "Kernel": weight.shape[2:],
            "Groups": 1, "Weights": {"Type": FORMATS[kind][0], "Count": math.prod(weight.shape)},
        }  # fmt: skip

    def _tactic(self, kind: str) -> str:
        words = TACTIC["TF32" if kind == "FLOAT" and self._engine._plan.tf32 else kind]
        return f"sm80_xmma_fprop_implicit_gemm_{words}_nhwckrsc_nhwc_simple_t1r1s1"

    def _port(self, tensor: graph.Value, dtype: str | None, index: int) -> dict[str, Any]:
        spellings = FORMATS[dtype or tensor.dtype]
        hidden = bool(self._engine._plan.profiles) and self._api.behaviour.hides_maps
        return {
            "Name": tensor.name,
            "Location": "Device",
            "Dimensions": self._dimensions(tensor),
            "Format/Datatype": HIDDEN if hidden else spellings[index % len(spellings)],
        }

    def _dimensions(self, tensor: graph.Value) -> list[int]:
        if self.execution_context is None:
            return tensor.shape
        sizes = self.execution_context._sizes() or {}
        return [size if isinstance(size, int) else sizes.get(size, -1) for size in tensor.dims]


def groups(model: onnx.ModelProto) -> list[list[Any]]:
    """Groups the nodes by layer: a convolution and its activation, or a few other operators."""
    nodes = [node for node in model.graph.node if node.op_type not in NO_LAYER]
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: list[list[Any]] = []
    fused: set[str] = set()
    for node in nodes:
        if node.output[0] in fused:
            continue
        if node.op_type in CONVOLUTIONS:
            after = readers.get(node.output[0], [])
            members = [node, *(one for one in after if len(after) == 1 and one.op_type in FUSED)]
            fused |= {one.output[0] for one in members}
            found.append(members)
        elif found and found[-1][0].op_type not in CONVOLUTIONS and len(found[-1]) < MOST:
            found[-1].append(node)
        else:
            found.append([node])
    return found
