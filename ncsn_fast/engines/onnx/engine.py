"""engine="ort": ONNX Runtime, on the CPU or through its CUDA provider.

The provider options are documented on "CUDA Execution Provider" of onnxruntime.ai/docs:
`user_compute_stream`, `use_tf32`, "Performance Tuning" (no synchronisation after a run) and "Using
CUDA Graphs", with the constraints on a captured graph.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ncsn_fast.engines import reference_check
from ncsn_fast.engines.base import (
    EngineError,
    EngineUnavailable,
)
from ncsn_fast.engines.batch_sizes import default_batch_size
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.model import make_onnx, read_onnx
from ncsn_fast.engines.onnx.network import refusal
from ncsn_fast.engines.static_engine import BufferedEngine
from ncsn_fast.engines.weights import without_weights
from ncsn_fast.models.adapter import ParameterisedConfig
from ncsn_fast.models.classes import default_label
from ncsn_fast.models.score import ScoreModel

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """An InferenceSession and, on a GPU, the stream on which it runs asynchronously.

    The stream is our own: ONNX Runtime takes torch's default stream, whose handle is 0, for none.
    """

    ort: Any
    stream: torch.cuda.Stream | None = None
    settings: Any = None  # RunOptions

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Orders the block's work after torch's current stream, and before what follows on it."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


# Engines of one model share a session, and with it the weights, as long as one of them lives.
_SESSIONS: weakref.WeakValueDictionary[tuple[Any, ...], Session] = weakref.WeakValueDictionary()


@dataclasses.dataclass
class _Buffers:
    """Inputs and outputs of a session for images of one shape, at fixed addresses."""

    session: Session
    x: Tensor
    sigma: Tensor | None
    labels: Tensor | None
    f: Tensor
    binding: Any


class OrtEngine(BufferedEngine):
    """The network as an ONNX graph, run by ONNX Runtime on buffers that are bound once.

    The graph is written in memory (engines/onnx/model.py) with dynamic sizes, so that one session
    serves all micro-batches and image sizes. The weights are checked against the reference once.

    Args:
        onnx: a file that `export_onnx` wrote for this model, to run instead. Its content, passed as
            bytes, is trusted without a check.
        graph: "on" replays CUDA graphs that ONNX Runtime captures: one launch per call. Each shape
            and each calling thread then has a session with its own weights.

    Attributes:
        error: largest relative error of f against the reference, over `levels` noise levels.

    Raises:
        EngineError: the output differs from the reference by more than precision.BOUNDS, or the
            file was not written for this model.
        EngineUnavailable: the network has no ONNX graph (see `refuses`); the CUDA provider does
            not start, or cannot capture the graph. ONNX Runtime would continue without it.
    """

    name = "ort"
    summary = "ONNX Runtime, its CPU or CUDA provider"
    dtypes = ("fp16", "fp32")
    device_types = ("cpu", "cuda")
    options: ClassVar[dict[str, tuple[str, ...]]] = {"onnx": ("FILE",), "graph": ("off", "on")}

    def __init__(
        self,
        model: ScoreModel,
        *,
        onnx: str | Path | bytes | None = None,
        graph: str = "off",
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.check_options({"graph": graph})
        if graph == "on" and self.device.type == "cpu":
            raise ValueError("graph='on' is for CUDA graphs; on a CPU leave it 'off'")
        if graph == "on" and onnx is not None:
            raise ValueError("graph='on' writes a graph for each shape; leave onnx= out")
        if onnx is not None and not isinstance(onnx, bytes):
            onnx = read_onnx(onnx, model, self.dtype)
        # Graphs of other shapes are written later, from the weights as they are now.
        self._source = copy.deepcopy(model).cpu() if graph == "on" else None
        self._session = None if graph == "on" else self._shared_session(onnx)
        inputs = [] if self._session is None else self._session.ort.get_inputs()[0].shape
        self._fixed = {axis: n for axis, n in enumerate(inputs) if isinstance(n, int)}
        self.release()
        size = self.batch_size if graph == "on" else self._fixed.get(0)
        self.error, self.levels = reference_check.check_precision(self, size)
        self.model = without_weights(model)

    @property
    def gives_scaled_score(self) -> bool:
        return isinstance(self.model.config, ParameterisedConfig)

    def condition(self, sigma: Tensor) -> Tensor | None:
        return reference_check.exported_condition(self.model, sigma)

    @classmethod
    def unavailable(cls) -> str | None:
        missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
        if not missing:
            return None
        return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        # With a GPU, a graph may be written for each number of images: graph="on".
        return refusal(model, wide=True, any_number=not torch.cuda.is_available())

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        files = {k for k, v in given.items() if k == "onnx" and isinstance(v, (str, Path))}
        super().check_options({k: v for k, v in given.items() if k not in files})

    @classmethod
    def default_dtype(cls, device: torch.device) -> str:
        # On CPUs, ONNX Runtime computes fp16 graphs in float32.
        return "fp32" if device.type == "cpu" else "fp16"

    @classmethod
    def default_batch_size(
        cls, n: int, shape: tuple[int, int, int], device: torch.device, options: Mapping[str, Any]
    ) -> int:
        if options.get("graph") == "on":  # few sizes, as each is a session with its own weights
            return default_batch_size(n, shape, device)
        return super().default_batch_size(n, shape, device, options)

    def release(self) -> None:
        super().release()
        self._buffers: dict[tuple[Any, ...], _Buffers] = {}

    def network(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        self.check_call(x, level, labels)
        self._check_shape(x.shape)
        # A session with a CUDA graph may not be run from several threads.
        key = (x.shape, None if self._source is None else threading.get_ident())
        with self._lock:
            if key not in self._buffers:
                self._buffers[key] = self._bind(x.shape)
            buffers = self._buffers[key]
            f = torch.empty_like(buffers.f)
            with buffers.session.on_stream():
                buffers.x.copy_(x)
                if buffers.sigma is not None and level is not None:
                    buffers.sigma.copy_(level)
                if buffers.labels is not None:
                    buffers.labels.fill_(default_label(self.model.config) or 0)
                    if labels is not None:
                        buffers.labels.copy_(labels)
                session = buffers.session
                try:
                    session.ort.run_with_iobinding(buffers.binding, session.settings)
                except Exception as error:  # ONNX Runtime's errors have no other base
                    raise EngineError(f"ONNX Runtime cannot run this network: {error}") from error
                f.copy_(buffers.f)
            return f

    def _check_shape(self, shape: torch.Size) -> None:
        """Raises ValueError unless the graph accepts images of this shape."""
        for axis, fixed in self._fixed.items():
            if fixed != shape[axis]:
                option = "batch_size" if axis == 0 else "image size"
                raise ValueError(
                    f"the ONNX file was exported for {option} {fixed}; got {shape[axis]}. Export "
                    "it with --batch dynamic --size dynamic, or use that size"
                )

    def _bind(self, shape: torch.Size) -> _Buffers:
        import numpy as np

        session = self._session or self._graph_session(shape)
        with torch.inference_mode(False):  # to be written in any mode later
            x, f = (torch.zeros(shape, device=self.device) for _ in range(2))
            sigma = None
            if reference_check.takes_sigma(self.model):
                sigma = torch.zeros(len(x), device=self.device)
            labels, label = None, default_label(self.model.config)
            if label is not None:
                labels = torch.full((len(x),), label, device=self.device)
        binding = session.ort.io_binding()
        place = self.device.type, self.device.index or 0
        inputs = {"x": x, "sigma": sigma, "labels": labels, "f": f}
        for name, tensor in inputs.items():
            if tensor is not None:
                bind = binding.bind_output if name == "f" else binding.bind_input
                element = np.int64 if tensor.dtype is torch.int64 else np.float32
                bind(name, *place, element, tuple(tensor.shape), tensor.data_ptr())
        return _Buffers(session, x, sigma, labels, f, binding)

    def _shared_session(self, content: bytes | None) -> Session:
        """Returns the live session for this model, dtype, device and threads, or a new one."""
        threads = self.threads or torch.get_num_threads()
        if content is not None:
            return open_session(content, self.device, threads)
        key = (self.model.digest(), self.dtype, str(self.device), threads)
        found = _SESSIONS.get(key)
        if found is None:
            try:
                content = make_onnx(self.model, dtype=self.dtype)
            except UnsupportedNetwork as error:
                raise EngineUnavailable(
                    f"engine 'ort' does not run networks with {error}; use engine='eager'"
                ) from error
            found = open_session(content, self.device, threads)
            _SESSIONS[key] = found
        return found

    def _graph_session(self, shape: torch.Size) -> Session:
        """Opens a session for one shape; its CUDA graph keeps the addresses of the first run."""
        assert self._source is not None
        n, _, height, width = shape
        content = make_onnx(self._source, dtype=self.dtype, batch=n, size=(height, width))
        return open_session(content, self.device, self.threads or 1, graph=True)


def open_session(
    content: bytes, device: torch.device, threads: int, *, graph: bool = False
) -> Session:
    """Opens a session with the device's own provider and no fallback.

    Raises:
        EngineUnavailable: the provider does not start, or cannot capture the graph. ONNX Runtime
            would warn and continue with another one.
    """
    import onnxruntime

    name = PROVIDERS[device.type]
    remedy = f"use device='cpu', or engine='{'cuda' if device.type == 'cuda' else 'eager'}'"
    if name not in onnxruntime.get_available_providers():
        raise EngineUnavailable(
            f"engine 'ort' cannot run on {device}: this onnxruntime has no {name}; "
            f"pip install onnxruntime-gpu instead of onnxruntime, or {remedy}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    stream, asked, settings = None, {}, None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        asked = {
            "device_id": str(device.index or 0),
            "use_tf32": "0",
            "user_compute_stream": str(stream.cuda_stream),
            **({"enable_cuda_graph": "1"} if graph else {}),
        }
        settings = onnxruntime.RunOptions()
        settings.add_run_config_entry("disable_synchronize_execution_providers", "1")
    uncaptured = "engine 'ort' cannot capture this network in a CUDA graph"
    try:
        built = onnxruntime.InferenceSession(
            content, options, providers=[(name, asked)], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's errors have no other base
        if not graph:
            raise EngineError(f"ONNX Runtime cannot open this network: {error}") from error
        raise EngineUnavailable(f"{uncaptured}: {error}; use graph='off'") from error
    if built.get_providers()[0] != name:
        raise EngineUnavailable(
            f"engine 'ort' cannot run on {device}: {name} did not start, so ONNX Runtime took "
            f"{built.get_providers()[0]}; install CUDA and cuDNN for onnxruntime-gpu, or {remedy}"
        )
    if graph and built.get_provider_options()[name].get("enable_cuda_graph") != "1":
        raise EngineUnavailable(
            f"{uncaptured}: this onnxruntime did not take the option; pip install --upgrade "
            "onnxruntime-gpu, or use graph='off'"
        )
    return Session(built, stream, settings)
