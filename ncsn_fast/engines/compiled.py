"""engine="compile": the network compiled by torch.compile, on the CPU or a GPU."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ncsn_fast.engines import reference_check
from ncsn_fast.engines.base import (
    DTYPES,
    Engine,
    EngineError,
    EngineUnavailable,
)
from ncsn_fast.engines.batch_sizes import default_batch_size
from ncsn_fast.engines.torch_settings import (
    compiler_settings,
    cudnn_precision,
    to_channels_last,
)
from ncsn_fast.engines.weights import without_weights
from ncsn_fast.models.adapter import ParameterisedConfig
from ncsn_fast.models.classes import default_label
from ncsn_fast.models.layers import InstanceNormPlus
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.ops import backends, reference

_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that use CUDA graphs
_COMPILERS = {"darwin": "clang++", "win32": "cl"}  # torch's defaults; g++ elsewhere
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_SHAPES = 1 << 16  # recompile limit; by default torch stops after eight shapes


class CompileEngine(Engine):
    """The model's modules compiled by torch.compile, channels-last.

    Fused ops are written out in plain PyTorch for the compiler. Convolutions and the maps between
    them use the engine's dtype; norms compute their statistics in float32, and the time embedding
    is float32 throughout. Compilation takes seconds to minutes per shape: a new micro-batch size
    (`resized`), image size or number of threads compiles again at its first call. On the CPU,
    weights are frozen into the compiled code, so each shape holds its own packed copy. torch's disk
    cache (TORCHINDUCTOR_CACHE_DIR) shortens later compilations.

    Args:
        mode: mode of torch.compile. "max-autotune" and "reduce-overhead" use CUDA graphs: they need
            a GPU, and all calls must come from one thread.

    Attributes:
        error: largest relative error of f against the reference, over `levels` noise levels.

    Raises:
        EngineError: the output differs from the reference by more than precision.BOUNDS, or the
            CPU does not support the dtype.
        EngineUnavailable: torch.compile fails here.
    """

    name = "compile"
    summary = "torch.compile, CPU or GPU"
    dtypes = ("bf16", "fp16", "tf32", "fp32")
    device_types = ("cpu", "cuda")
    options: ClassVar[dict[str, tuple[str, ...]]] = {
        "mode": ("default", "max-autotune-no-cudagraphs", *_GRAPHS)
    }

    def __init__(self, model: ScoreModel, *, mode: str = "default", **settings: Any) -> None:
        super().__init__(model, **settings)
        self.check_options({"mode": mode})
        self._check_device(mode)
        self._graphs = mode in _GRAPHS
        self._lock = threading.Lock()  # one call at a time, whatever its size
        with torch.inference_mode(False):  # inference tensors have no version counters
            self.replica = _CompilableModel(model, DTYPES[self.dtype]).to(self.device)
        to_channels_last(self.replica)
        self._run = torch.compile(self.replica, dynamic=False, fullgraph=True, mode=mode)
        self.error, self.levels = reference_check.check_precision(self, self.batch_size)
        self.model = without_weights(model)

    def _check_device(self, mode: str) -> None:
        if self.device.type == "cuda":
            return
        if mode in _GRAPHS:
            raise ValueError(
                f"mode={mode!r} makes CUDA graphs; on a CPU use mode='default' or "
                "'max-autotune-no-cudagraphs'"
            )
        if self.dtype in ("fp16", "tf32"):
            raise EngineError(
                f"engine 'compile' computes in {self.dtype} on GPUs only; use dtype='bf16' or "
                "'fp32'"
            )

    @classmethod
    def unavailable(cls) -> str | None:
        if importlib.util.find_spec("torch._inductor") is None:
            return "this torch has no inductor: install a build of torch from pytorch.org"
        compiler = os.environ.get("CXX", _COMPILERS.get(sys.platform, "g++"))
        if shutil.which(compiler) is None:
            return (
                f"torch.compile needs a C++ compiler and finds no {compiler}: install one, or name "
                "it in the environment variable CXX"
            )
        return backends.missing("triton") or None if torch.cuda.is_available() else None

    @classmethod
    def default_dtype(cls, device: torch.device) -> str:
        """Returns bf16 on a GPU that supports it (fp16 before Ampere), fp32 on the CPU."""
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    @classmethod
    def default_batch_size(
        cls, n: int, shape: tuple[int, int, int], device: torch.device, options: Mapping[str, Any]
    ) -> int:
        return default_batch_size(n, shape, device)  # few sizes, as each is compiled

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        with super().context(), torch.cuda.device(self.device) if on_gpu else _NOTHING:
            yield

    def network(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        import torch._dynamo.exc

        self.check_call(x, level, labels)
        x, level = _with_usual_strides(x, None if self.model.conditioning == "none" else level)
        on_gpu, precision = self.device.type == "cuda", "tf32" if self.dtype == "tf32" else "ieee"
        with (
            self._lock,
            compiler_settings(freezing=not on_gpu, shapes=_SHAPES),
            cudnn_precision(precision, self.device),
        ):
            if self._graphs:
                torch.compiler.cudagraph_mark_step_begin()
            try:
                f = self._run(x, level, *(() if labels is None else (labels,)))
            except torch._dynamo.exc.TorchDynamoException as error:
                raise EngineUnavailable(_failure(error)) from error
            return f.clone() if self._graphs else f  # the next replay overwrites it


def _with_usual_strides(x: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gives both tensors the usual strides of their shapes, to avoid recompilation.

    Strides along a dimension of size 1 are arbitrary, and those of an expanded level are 0; torch
    would compile for each of them.
    """
    _, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    x = x.as_strided(x.shape, (h * w * c, 1, w * c, c))
    return x, None if level is None else level.contiguous().as_strided(level.shape, (1,))


def _failure(error: Exception) -> str:
    """Condenses torch's error report to one line with a remedy."""
    home = str(Path(torch.__file__).parent)
    if any(letter.isspace() for letter in home):
        return (
            f"torch.compile fails here: a folder above torch has a space in its name ({home}), "
            "which the compiler's command line does not bear; move the environment, or use "
            "engine='eager'"
        )
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    cause = next((line.strip() for line in rest if "cannot" in line or "error:" in line), "")
    return f"torch.compile fails here: {first} {cause}".strip() + "; use engine='eager'"


class _CompilableModel(nn.Module):
    """A copy of a model for compilers: plain PyTorch, convolutions in one dtype, float32 output."""

    def __init__(self, model: ScoreModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = copy.deepcopy(model.net).eval().requires_grad_(False)
        self.default_label, self.dtype = default_label(model.config), dtype
        self.ours = not isinstance(model.config, ParameterisedConfig)
        for module in self.net.modules() if self.ours else ():
            if type(module) in _REPLACEMENTS:
                module.__class__ = _REPLACEMENTS[type(module)]
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(dtype)

    def forward(self, x: Tensor, level: Tensor | None, labels: Tensor | None = None) -> Tensor:
        if labels is None and self.default_label is not None:
            labels = torch.full((len(x),), self.default_label, device=x.device)
        if self.ours:
            return self.net(x, level, *(() if labels is None else (labels,))).float()
        low = self.dtype is not torch.float32
        with torch.autocast(x.device.type, self.dtype if low else torch.bfloat16, enabled=low):
            return self.net(x, level, labels).float()


class _CompilableNorm(InstanceNormPlus):
    def forward(self, x: Tensor, level: Tensor | None = None, *, elu: bool = False) -> Tensor:
        return reference.instance_norm_plus(x, *self.parameters_at(level), elu=elu)


class _Convolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class _ConvolutionTranspose(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x.to(self.weight.dtype), output_size)


_REPLACEMENTS: Mapping[type[nn.Module], type[nn.Module]] = {
    InstanceNormPlus: _CompilableNorm,
    nn.Conv2d: _Convolution,
    nn.ConvTranspose2d: _ConvolutionTranspose,
}
