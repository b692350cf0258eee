"""ncsn_fast: fast inference, and training, of score-based generative models (NCSN, NCSNv2).

The public names are imported when they are first used: `import ncsn_fast` takes no time, and the
commands can say --help, or be interrupted, before torch is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncsn_fast.checkpoints.loading import load
    from ncsn_fast.checkpoints.torch_file import CheckpointError
    from ncsn_fast.diffusion.parameterisation import DiscreteVP, Parameterisation
    from ncsn_fast.engines import EngineError, EngineUnavailable
    from ncsn_fast.exporters.onnx import export_onnx
    from ncsn_fast.exporters.tensorrt import export_trt
    from ncsn_fast.models.score import ModelConfig, ScoreModel
    from ncsn_fast.models.wrap import wrap
    from ncsn_fast.sampler import Sampler, SamplingError
    from ncsn_fast.training.tuning import tune

    __version__: str

__all__ = [
    "CheckpointError",
    "DiscreteVP",
    "EngineError",
    "EngineUnavailable",
    "ModelConfig",
    "Parameterisation",
    "Sampler",
    "SamplingError",
    "ScoreModel",
    "__version__",
    "export_onnx",
    "export_trt",
    "load",
    "tune",
    "wrap",
]

# Where the names are. model_folder.py has models that can be saved.
_MODULES = {
    "CheckpointError": "checkpoints.torch_file",
    "EngineError": "engines",
    "EngineUnavailable": "engines",
    "DiscreteVP": "diffusion.parameterisation",
    "ModelConfig": "checkpoints.model_folder",
    "Parameterisation": "diffusion.parameterisation",
    "Sampler": "sampler",
    "SamplingError": "sampler",
    "ScoreModel": "checkpoints.model_folder",
    "export_onnx": "exporters.onnx",
    "export_trt": "exporters.tensorrt",
    "load": "checkpoints.loading",
    "tune": "training.tuning",
    "wrap": "checkpoints.model_folder",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ncsn_fast")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
