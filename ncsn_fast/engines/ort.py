"""engine="ort": ONNX Runtime, on the CPU or through its CUDA provider."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ncsn_fast.engines import precision
from ncsn_fast.engines.base import Engine, EngineUnavailable, without_weights
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.engines.onnx_model import make_onnx, read_onnx
from ncsn_fast.models.score import ScoreModel

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Engines of one model share a session, and with it the weights, while one of them lives.
_SESSIONS: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


@dataclasses.dataclass
class _Buffers:
    """What a session reads and writes for images of one shape, at fixed addresses."""

    x: Tensor
    condition: Tensor | None
    f: Tensor
    binding: Any


class OrtEngine(Engine):
    """The network as an ONNX graph, run by ONNX Runtime on buffers that are bound once.

    The graph is written in memory (engines/onnx_model.py) with open sizes, so that one session
    serves all micro-batches and images. The weights are checked against the reference once.

    Args:
        onnx: a file that `export_onnx` made of this model, to run instead. The content of one
            (bytes) is trusted to be that.

    Attributes:
        error: largest relative error of f against the reference, at so many noise `levels`.

    Raises:
        EngineError: the output differs from the reference by more than precision.BOUNDS, or the
            file is not one of this model's.
        EngineUnavailable: the CUDA provider does not start. ONNX Runtime would go on without it.
    """

    name = "ort"
    summary = "ONNX Runtime, its CPU or CUDA provider"
    dtypes = ("fp16", "fp32")
    device_types = ("cpu", "cuda")
    options: ClassVar[dict[str, tuple[str, ...]]] = {"onnx": ("FILE",)}

    def __init__(
        self, model: ScoreModel, *, onnx: str | Path | bytes | None = None, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        if onnx is not None and not isinstance(onnx, bytes):
            onnx = read_onnx(onnx, model, self.dtype)
        self._session = self._shared_session(onnx)
        self._shape = self._session.get_inputs()[0].shape  # numbers where the file fixes them
        self.release()
        self.error, self.levels = self._check_precision()
        self.model = without_weights(model)

    @classmethod
    def unavailable(cls) -> str | None:
        missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
        if not missing:
            return None
        return f"{' and '.join(missing)} not installed: pip install 'ncsn_fast[onnx]'"

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        files = {k for k, v in given.items() if k == "onnx" and isinstance(v, (str, Path))}
        super().check_options({k: v for k, v in given.items() if k not in files})

    @classmethod
    def default_dtype(cls) -> str:
        return "fp32"  # on CPUs, ONNX Runtime computes fp16 graphs in float32

    def resized(self, batch_size: int) -> OrtEngine:
        other = copy.copy(self)
        other.batch_size = batch_size
        other.release()
        return other

    def release(self) -> None:
        self._buffers: dict[torch.Size, _Buffers] = {}
        self._busy = threading.Lock()  # buffers serve one call at a time

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        self._check_call(x, level)
        with self._busy:
            if x.shape not in self._buffers:
                self._buffers[x.shape] = self._bound(x.shape)
            buffers = self._buffers[x.shape]
            buffers.x.copy_(x)
            if buffers.condition is not None and level is not None:
                buffers.condition.copy_(level)
            if self.device.type == "cuda":  # ONNX Runtime has a stream of its own
                torch.cuda.current_stream(self.device).synchronize()
            self._session.run_with_iobinding(buffers.binding)
            return buffers.f.clone()

    def _check_call(self, x: Tensor, level: Tensor | None) -> None:
        """ValueError unless the network, the micro-batch and the graph take these."""
        self.model.net.check_input(x)
        if len(x) != self.batch_size:
            raise ValueError(f"this engine runs batches of {self.batch_size}; got {len(x)} images")
        for axis, (fixed, given) in enumerate(zip(self._shape, x.shape, strict=True)):
            if isinstance(fixed, int) and fixed != given:
                option = "batch_size" if axis == 0 else "image size"
                raise ValueError(
                    f"the ONNX file was exported for {option} {fixed}; got {given}. Export it with "
                    "--batch dynamic --size dynamic, or use that size"
                )
        if level is None and self.model.conditioning != "none":
            raise ValueError(f"this network is conditioned on the {self.model.conditioning}")

    def _bound(self, shape: torch.Size) -> _Buffers:
        import numpy as np

        with torch.inference_mode(False):  # written in any mode later
            x, f = (torch.zeros(shape, device=self.device) for _ in range(2))
            kinds = {"level": torch.int64, "time": torch.float32}
            kind = kinds.get(self.model.conditioning)
            condition = None
            if kind is not None:
                condition = torch.zeros(len(x), dtype=kind, device=self.device)
        binding = self._session.io_binding()
        place = self.device.type, self.device.index or 0
        for name, tensor in (("x", x), (self.model.conditioning, condition), ("f", f)):
            if tensor is not None:
                bind = binding.bind_output if name == "f" else binding.bind_input
                element = np.int64 if tensor.dtype is torch.int64 else np.float32
                bind(name, *place, element, tuple(tensor.shape), tensor.data_ptr())
        return _Buffers(x, condition, f, binding)

    def _shared_session(self, content: bytes | None) -> Any:
        """The session of this model, type, device and number of threads, if one lives, or a new."""
        threads = self.threads or torch.get_num_threads()
        if content is not None:
            return session(content, self.device, threads)
        key = (self.model.digest(), self.dtype, str(self.device), threads)
        found = _SESSIONS.get(key)
        if found is None:
            found = session(make_onnx(self.model, dtype=self.dtype), self.device, threads)
            _SESSIONS[key] = found
        return found

    def _check_precision(self) -> tuple[float, int]:
        """The largest error of f against the reference, and the number of levels it was seen at."""
        reference = _Contiguous(
            self.model, device=self.device, dtype="fp32", batch_size=1, threads=self.threads
        )
        x, levels = precision.probes(self.model, 1)
        condition = self.model.condition(self.model.sigmas[levels.to(self.model.device)])
        with FlopCounterMode(display=False) as counter:
            reference.output(x, None if condition is None else condition.cpu())
        n = precision.probe_count(self.model, counter.get_total_flops())
        size = self._shape[0] if isinstance(self._shape[0], int) else min(n, self.batch_size)
        return precision.check_precision(self.resized(size), reference.resized(size), n), n


class _Contiguous(EagerEngine):
    """The reference on contiguous maps: torch's channels-last group norm loses two digits."""

    def __init__(self, model: ScoreModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.replica.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def network(self, x: Tensor, level: Tensor | None) -> Tensor:
        return self.replica(x, level)


def session(content: bytes, device: torch.device, threads: int) -> Any:
    """An InferenceSession of a device's own provider, and of no other.

    EngineUnavailable: the provider does not start. By itself ONNX Runtime would warn and go on with
    another one.
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
    settings = {}
    if device.type == "cuda":
        settings = {"device_id": str(device.index or 0), "use_tf32": "0"}
    built = onnxruntime.InferenceSession(
        content, options, providers=[(name, settings)], enable_fallback=0
    )
    if built.get_providers()[0] != name:
        raise EngineUnavailable(
            f"engine 'ort' cannot run on {device}: {name} did not start, so ONNX Runtime took "
            f"{built.get_providers()[0]}; install CUDA and cuDNN for onnxruntime-gpu, or {remedy}"
        )
    return built
