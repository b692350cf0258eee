"""Simulated machine with TensorRT: a double, whose GPU is the CPU."""

import importlib.machinery
import sys

import tensorrt_double
import torch

from ncsn_fast import Sampler
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt import engine as trt
from ncsn_fast.engines.tensorrt.engine import TrtEngine
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache

CPU = torch.device("cpu")


def install(monkeypatch, folder, version, **knobs):
    """Installs the double of a TensorRT version, whose GPU is the CPU; returns its settings."""
    module = tensorrt_double.make(version, **knobs)
    module.__dict__["__spec__"] = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setattr(TrtEngine, "device_types", ("cpu",))
    monkeypatch.setattr(trt, "DEFAULT_FAMILY", "cuda")  # the extension's kernels, on the CPU
    monkeypatch.setattr(trt_api, "problem", lambda: None)
    return tensorrt_double.behaviour_of(module)


def count_builds(monkeypatch):
    """Returns a list that receives the settings of every build."""
    seen, real = [], trt.build_plan

    def counted(module, onnx, settings, **more):
        seen.append(settings)
        return real(module, onnx, settings, **more)

    monkeypatch.setattr(trt, "build_plan", counted)
    return seen


def engine(of, dtype="fp32", batch_size=2, **options):
    return TrtEngine(of, device=CPU, dtype=dtype, batch_size=batch_size, threads=1, **options)


def plans(folder=None):
    """Returns the cached files other than timings."""
    return [entry for entry in PlanCache(folder).entries() if entry.path.suffix == ".plan"]


def sampler(of, batch_size=2, dtype="fp32", **options):
    settings = {"engine": "trt", "batch_size": batch_size, "dtype": dtype, "threads": 1}
    return Sampler(of, **settings, **options)
