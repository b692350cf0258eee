"""ncsn_fast: fast inference, and training, of score-based generative models (NCSN, NCSNv2)."""

from importlib.metadata import PackageNotFoundError, version

from ncsn_fast.checkpoints.loading import load
from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.engines import EngineError, EngineUnavailable
from ncsn_fast.exporters.onnx import export_onnx
from ncsn_fast.exporters.tensorrt import export_trt
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.sampler import Sampler, SamplingError

try:
    __version__ = version("ncsn_fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CheckpointError",
    "EngineError",
    "EngineUnavailable",
    "ModelConfig",
    "Sampler",
    "SamplingError",
    "ScoreModel",
    "__version__",
    "export_onnx",
    "export_trt",
    "load",
]
