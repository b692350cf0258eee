"""Refitter: replaces an engine's weights from an ONNX file of the same network."""

from __future__ import annotations

import dataclasses
from typing import Any

from tensorrt_double import graph
from tensorrt_double.builder import NULL
from tensorrt_double.logs import Log
from tensorrt_double.parser import DAMAGED, ParserError


class Refitter:
    """Refits an engine in place; all contexts compute with the new weights."""

    facade = "Refitter"
    stored = ("logger", "max_threads", "weights_validation")

    def __init__(self, api: Any, engine: Any, logger: Any) -> None:
        self._api, self._engine, self._log = api, engine, Log(api, logger)
        self.logger, self.max_threads, self.weights_validation = logger, 1, True
        self._content: bytes | None = None
        if not engine.refittable:
            self._log.error("IRefitter::IRefitter", "Cannot create a refitter: the engine was not "
                            "built with BuilderFlag::kREFIT.", 3)  # fmt: skip
            raise TypeError(NULL)

    def refit_cuda_engine(self) -> bool:
        if self._content is not None:
            self._engine._load(self._content)
            plan = dataclasses.replace(self._engine._plan, onnx=self._content)
            self._engine._plan = plan
            self._content = None
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        return self.refit_cuda_engine()

    def get_all_weights(self) -> list[str]:
        return [one.name for one in self._engine._model.graph.initializer]

    def get_missing_weights(self) -> list[str]:
        return []


class OnnxParserRefitter:
    facade = "OnnxParserRefitter"

    def __init__(self, api: Any, refitter: Refitter, logger: Any) -> None:
        self._api, self._refitter, self._log = api, refitter, Log(api, logger)
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError | None:
        return self._errors[index] if 0 <= index < len(self._errors) else None

    def clear_errors(self) -> None:
        self._errors.clear()

    def refit_from_bytes(self, model: Any, path: str | None) -> bool:
        parsed = graph.parse(bytes(model))
        if parsed is None:
            return self._fail("MODEL_DESERIALIZE_FAILED", DAMAGED, "deserializeOnnxModel")
        if graph.structure(parsed) != graph.structure(self._refitter._engine._model):
            text = "Assertion failed: the weights of the model are not those of the engine"
            return self._fail("REFIT_FAILED", text, "refitOnnxWeights")
        self._refitter._content = bytes(model)
        return True

    def _fail(self, code: str, text: str, func: str) -> bool:
        error = ParserError(self._api, code, text, func, "ModelRefitter.cpp", 1)
        self._errors.append(error)
        self._log.write("ERROR", str(error))
        return False
