"""EngineInspector: an engine's layers, in TensorRT's JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from tensorrt_double import graph

FORMATS = {  # what the same type is called, by the layer that has it
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
CONVOLUTIONS = ("Conv", "ConvTranspose")
FUSED = ("Elu", "Relu", "LeakyRelu")  # into the convolution whose output they take
NO_LAYER = ("Constant", "Identity")


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
        return json.dumps({"Layers": self._shown(), "Bindings": bindings}, indent=1)

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
        """One by convolution, with the activation after it, and one by other operator."""
        model, made = self._engine._model, self._engine._plan
        tensors = graph.values(model)
        nodes = [node for node in model.graph.node if node.op_type not in NO_LAYER]
        weights = {one.name for one in model.graph.initializer}
        readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        layers: list[dict[str, Any]] = []
        done: set[str] = set()
        widened = not made.float_convolution
        for node in nodes:
            if node.output[0] in done:
                continue
            members = [node]
            after = readers.get(node.output[0], [])
            convolution = node.op_type in CONVOLUTIONS
            if convolution and len(after) == 1 and after[0].op_type in FUSED:
                members.append(after[0])
            done |= {one.output[0] for one in members}
            wide = (convolution and not widened) or not made.typed
            widened = widened or convolution
            layers.append(self._layer(members, tensors, weights, wide, len(layers)))
        return layers

    def _layer(self, members: list[Any], tensors: Any, weights: set[str], wide: bool,
               index: int) -> dict[str, Any]:  # fmt: skip
        node = members[0]
        kind = tensors[node.output[0]].dtype
        convolution = node.op_type in CONVOLUTIONS
        dtype = "FLOAT" if wide and kind in ("HALF", "BF16") else kind
        layer = {
            "Name": " + ".join(one.name or one.output[0] for one in members),
            "LayerType": "CaskConvolution" if convolution else "kgen",
            "Inputs": [
                self._port(tensors[name], dtype if convolution else None, index)
                for name in node.input if name and name not in weights
            ],
            "Outputs": [
                self._port(tensors[name], dtype if convolution else None, index + 1)
                for name in members[-1].output
            ],
            "ParameterType": "Convolution" if convolution else "kgen",
        }  # fmt: skip
        if node.op_type == "ConvTranspose":
            layer |= {"LayerType": "CaskDeconvolution", "ParameterType": "Deconvolution"}
        if convolution:
            tf32 = dtype == "FLOAT" and self._engine._plan.tf32
            words = TACTIC["TF32" if tf32 else dtype]
            name = FORMATS[dtype][0]
            layer["Weights"] = {"Type": name, "Count": math.prod(tensors[node.input[1]].shape)}
            layer["TacticName"] = f"sm80_xmma_fprop_implicit_gemm_{words}_nhwckrsc_nhwc_t1r1s1"
        else:
            layer["TacticName"] = f"__myl_{node.op_type}_0x{index:08x}"
        layer["StreamId"] = 0
        layer["Metadata"] = "\x1f".join(f"[ONNX Layer: {one.name}]" for one in members)
        return layer

    def _port(self, tensor: graph.Value, dtype: str | None, index: int) -> dict[str, Any]:
        spellings = FORMATS[dtype or tensor.dtype]
        return {
            "Name": tensor.name,
            "Location": "Device",
            "Dimensions": self._dimensions(tensor),
            "Format/Datatype": spellings[index % len(spellings)],
        }

    def _dimensions(self, tensor: graph.Value) -> list[int]:
        if self.execution_context is None:
            return tensor.shape
        sizes = self.execution_context._sizes() or {}
        return [size if isinstance(size, int) else sizes.get(size, -1) for size in tensor.dims]
