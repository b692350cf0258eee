"""Third-party runtimes on an ONNX file of static shape: ONNX Runtime and OpenVINO.

As a script, `onnx_runtimes.py MODEL_FOLDER BATCH OUT` exports the network of a model folder.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from published import Plain
from torch import Tensor
from workloads import SMALL

from ncsn_fast import ScoreModel
from ncsn_fast.models.architectures import ARCHITECTURES

Run = Callable[[], Tensor]
FOLDER = "NCSN_FAST_BENCHMARK_ONNX"  # environment variable: folder of this session's files


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Returns a temporary folder that is deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="ncsn_fast_onnx_")


def onnx_file(model: ScoreModel, x: Tensor) -> Path:
    """Exports the network as ONNX, once per session, model and input shape.

    The export runs in its own process, so that its memory and its modules do not count for the
    runtimes. Child processes reuse the file.
    """
    if FOLDER not in os.environ:
        os.environ[FOLDER] = _own_folder().name
    path = Path(os.environ[FOLDER]) / f"{model.digest()[:16]}-{len(x)}.onnx"
    if path.exists():
        return path
    folder = model.save_pretrained(path.with_suffix(".model"))
    done = subprocess.run(
        [sys.executable, __file__, folder, str(len(x)), path], capture_output=True, text=True
    )
    shutil.rmtree(folder)
    if done.returncode != 0:
        raise RuntimeError(f"the ONNX export failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return path


def ort(model: ScoreModel, x: Tensor) -> Run:
    """Returns ONNX Runtime's CPU provider with all optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads may spin within a run, but not beyond it, where they would slow the next provider.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(onnx_file(model, x)), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(precision: str) -> Callable[[ScoreModel, Tensor], Run]:
    """Returns a builder of OpenVINO's CPU plugin in "f32" or "bf16": one stream, for latency."""

    def build(model: ScoreModel, x: Tensor) -> Run:
        import openvino as ov

        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        compiled = ov.Core().compile_model(str(onnx_file(model, x)), "CPU", settings)
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

        def run() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data)

        return run

    return build


def export(folder: Path, batch: int, out: Path) -> None:
    """Writes the ONNX file of a model folder's network for a batch size."""
    ARCHITECTURES.update(SMALL)
    model = ScoreModel.from_pretrained(folder)
    x = torch.rand(batch, *model.image_shape)
    temporary, network = out.with_suffix(".partial"), Plain(model).eval()
    torch.onnx.export(
        network, (x,), str(temporary), dynamo=True, external_data=False, verbose=False
    )
    temporary.rename(out)


if __name__ == "__main__":
    export(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
