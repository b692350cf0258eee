"""Double of the TensorRT Python API: strict about names and types, computing on the CPU.

    trt = tensorrt_double.make("11.4")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)

It has exactly the names, signatures and enum members that were extracted from the real bindings
(tests/support/tensorrt_api, tools/read_tensorrt_api.py). Those that are not implemented raise
NotImplementedError; `with` blocks, which TensorRT deprecates, do not work. Addresses are those of
CPU memory, and ONNX Runtime computes.

Return values, log texts and exceptions of the builder were observed with TensorRT-RTX 1.7, whose
builder runs without a GPU; those of the runtime follow TensorRT's documentation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tensorrt_double import builder, config, context, inspector, logs, parser, refit, runtime
from tensorrt_double.api import Api, Module
from tensorrt_double.behaviour import Behaviour, Call

__all__ = ["VERSIONS", "Behaviour", "Call", "behaviour_of", "calls_of", "make"]

VERSIONS = ("10.16", "11.4")
IMPLEMENTATIONS = {
    kind.__name__: kind
    for kind in (
        logs.ILogger, logs.Logger, logs.IProgressMonitor, logs.IErrorRecorder, builder.Builder,
        parser.INetworkDefinition, parser.ITensor, config.IBuilderConfig,
        config.IOptimizationProfile, config.ITimingCache, config.IHostMemory,
        parser.OnnxParser, parser.ParserError, runtime.Runtime, runtime.ICudaEngine,
        runtime.ISerializationConfig,
        context.IExecutionContext, inspector.EngineInspector, refit.Refitter,
        refit.OnnxParserRefitter,
    )
}  # fmt: skip
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32,
         "INT64": np.int64, "BOOL": np.bool_, "UINT8": np.uint8}  # fmt: skip


def make(version: str, behaviour: Behaviour | None = None, **knobs: Any) -> Any:
    """Returns a module like `tensorrt` of version "10.16" or "11.4".

    Args:
        behaviour: settings, shared with the caller.   knobs: fields of a new Behaviour.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}; got {version!r}")
    api = Api(version, behaviour or Behaviour(**knobs))
    for name, implementation in IMPLEMENTATIONS.items():
        api.add_class(name, implementation)

    def nptype(trt_type: Any) -> Any:
        if trt_type.name not in NUMPY:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return NUMPY[trt_type.name]

    return Module(api, {"nptype": nptype, "volume": math.prod})


def behaviour_of(module: Any) -> Behaviour:
    """Returns the settings of a module from `make`."""
    return module.Builder._api.behaviour


def calls_of(context: Any) -> list[Call]:
    """Returns every execute_async_v3 of an execution context, including failed ones."""
    return type(context)._api.implementations[context]._calls
