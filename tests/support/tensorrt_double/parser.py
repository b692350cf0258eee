"""Networks, and the ONNX parser that fills them."""

from __future__ import annotations

from typing import Any

import onnx

from tensorrt_double import graph
from tensorrt_double.logs import Log

DAMAGED = (
    "Assertion failed: model->ParseFromCodedStream(&codedInput): Failed to parse the ONNX model."
)


class ITensor:
    facade = "ITensor"

    def __init__(self, api: Any, value: graph.Value, is_input: bool) -> None:
        self.name = value.name
        self.dtype = api.member(f"DataType.{value.dtype}")
        self.shape = api.names["Dims"](value.shape)
        self.is_network_input, self.is_network_output = is_input, not is_input
        self.is_execution_tensor, self.is_shape_tensor = True, False


class INetworkDefinition:
    """An empty network until a parser fills it."""

    facade = "INetworkDefinition"
    stored = ("name", "flags", "builder")

    def __init__(self, api: Any, builder: Any, flags: int) -> None:
        self._api, self._content, self._model = api, b"", onnx.ModelProto()
        self.builder, self.flags, self.name = builder, flags, "Unnamed Network 0"
        self.has_implicit_batch_dimension = False

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self._model.graph.output)

    def get_input(self, index: int) -> ITensor | None:
        return self._tensor(self._model.graph.input, index, True)

    def get_output(self, index: int) -> ITensor | None:
        return self._tensor(self._model.graph.output, index, False)

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def _tensor(self, infos: Any, index: int, is_input: bool) -> ITensor | None:
        if not 0 <= index < len(infos):
            self.builder._log.error(
                f"INetworkDefinition::get{'Input' if is_input else 'Output'}",
                f"Parameter check failed, condition: (0) <= (index) && (index) < {len(infos)}. "
                f"Invalid network output index: {index}.", 3,
            )  # fmt: skip
            return None
        return ITensor(self._api, graph.value(infos[index]), is_input)


class ParserError:
    facade = "ParserError"

    def __init__(self, api: Any, code: str, text: str, func: str, file: str, line: int,
                 node: Any = None, index: int = -1) -> None:  # fmt: skip
        self._code = api.member(f"ErrorCode.{code}")
        self._text, self._func, self._file, self._line = text, func, file, line
        self._node, self._index = node, index

    def code(self) -> Any:
        return self._code

    def desc(self) -> str:
        return self._text

    def func(self) -> str:
        return self._func

    def file(self) -> str:
        return self._file

    def line(self) -> int:
        return self._line

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name if self._node else ""

    def node_operator(self) -> str:
        return self._node.op_type if self._node else ""

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __str__(self) -> str:
        where = ""
        if self._node:
            where = f"In node {self._index} with name: {self._node.name} and operator: "
            where += f"{self._node.op_type} "
        return f"{where}({self._func}): {self._code.name}: {self._text}"


class OnnxParser:
    """Parser that accepts what ONNX Runtime and the operators' schemas accept.

    Like TensorRT's, it returns True for bytes that are an empty message: such a network has neither
    layers nor outputs.
    """

    facade = "OnnxParser"

    def __init__(self, api: Any, network: INetworkDefinition, logger: Any) -> None:
        self._api, self._network, self._log = api, network, Log(api, logger)
        self._errors: list[ParserError] = []
        self.flags = 1 << int(api.member("OnnxParserFlag.NATIVE_INSTANCENORM"))

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError | None:
        if not 0 <= index < len(self._errors):
            self._log.write("ERROR", f"vector::_M_range_check: __n (which is {index}) >= "
                                     f"this->size() (which is {len(self._errors)})")  # fmt: skip
            return None
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def parse(self, model: Any, path: str | None) -> bool:
        content = bytes(model)
        if self._network._content:
            text = "Parse was called with a non-empty network definition"
            return self._fail("INVALID_VALUE", text, "parse", 1170)
        parsed = graph.parse(content)
        if parsed is None:
            return self._fail("MODEL_DESERIALIZE_FAILED", DAMAGED, "deserializeOnnxModel", 73)
        for index, node in enumerate(parsed.graph.node):
            if node.domain or not onnx.defs.has(node.op_type):
                text = f"No importer registered for op: {node.op_type}"
                return self._fail("UNSUPPORTED_NODE", text, "getOpImporter", 130, node, index)
        for info in parsed.graph.input:
            if graph.value(info).dtype == "INT64":
                self._log.warning(
                    f"ModelImporter.cpp:1071: Make sure input {info.name} has Int64 binding."
                )
        self._network._content, self._network._model = content, parsed
        return True

    def parse_from_file(self, model: str) -> bool:
        try:
            with open(model, "rb") as file:
                return self.parse(file.read(), None)
        except OSError:
            text = f"Failed to open file: {model}"
            return self._fail("MODEL_DESERIALIZE_FAILED", text, "parseFromFile", 800)

    def supports_operator(self, op_name: str) -> bool:
        return onnx.defs.has(op_name)

    def _fail(self, code: str, text: str, func: str, line: int, node: Any = None,
              index: int = -1) -> bool:  # fmt: skip
        file = "ModelImporter.cpp" if node else "onnxProtoUtils.hpp"
        error = ParserError(self._api, code, text, func, file, line, node, index)
        self._errors.append(error)
        self._log.write("ERROR", str(error))
        return False
