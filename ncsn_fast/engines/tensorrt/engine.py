"""engine="trt": the network as a TensorRT engine, sampling in CUDA graphs with our update."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ncsn_fast.engines import reference_check
from ncsn_fast.engines.base import (
    PrecisionError,
)
from ncsn_fast.engines.batch_sizes import default_batch_size, largest_batch_size
from ncsn_fast.engines.cuda import kernels as gpu_kernels
from ncsn_fast.engines.cuda.graph_engine import GRAPHS, GraphEngine
from ncsn_fast.engines.cuda.graphs import empty_cache
from ncsn_fast.engines.onnx.model import make_onnx
from ncsn_fast.engines.onnx.network import refusal
from ncsn_fast.engines.tensorrt import api as trt_api
from ncsn_fast.engines.tensorrt.builder import LEVELS, Profile, Settings, build_plan
from ncsn_fast.engines.tensorrt.facts import facts_of, read_file
from ncsn_fast.engines.tensorrt.options import parse_batch, parse_size, parse_workspace
from ncsn_fast.engines.tensorrt.plan_cache import PlanCache, Stored, check_facts
from ncsn_fast.engines.tensorrt.runtime import TrtNetwork, TrtPlan, check_types
from ncsn_fast.engines.weights import without_weights
from ncsn_fast.models.adapter import ParameterisedConfig
from ncsn_fast.models.classes import default_label
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.ops.backends import DEFAULT_FAMILY

log = logging.getLogger(__name__)
CHECK_LEVELS, OTHER_SIZE_LEVELS = (
    12,
    3,
)  # noise levels checked: at the model's image size, at others
_ONNX_TYPES = {"tf32": "fp32"}
_FREE = ("batch", "size", "workspace", "plan")  # options with free-form values


class TrtEngine(GraphEngine):
    """Any network, built by TensorRT for this GPU once and kept in a cache of this user.

    The ONNX model sets the dtypes (engines/onnx/network.py). Each build and each load is compared
    with the reference at a dozen noise levels, and the dtypes of its convolutions are read back
    from TensorRT's inspector. Sampling runs TensorRT's kernels and our update in one CUDA graph.

    Args:
        graph, kernels: as for CudaEngine; `kernels` provide the update.
        batch: numbers of images "least:usual:largest", or one; limits micro-batches. None: tuned
            for batch_size, from 1 to the largest default batch size. A Sampler without a
            batch_size takes that largest for it, so that a plan does not depend on its first call.
        size: "H,W:H,W:H,W" or "H,W" of images; None for the model's.
        workspace: GB that a layer may use beside its maps; None for all there is.
        builder_level: 0 to 5, how long TensorRT searches for faster kernels; None for 3.
        refit: "on" builds an engine for all models of this structure, whose weights can be
            replaced.
        plan: a file that `export --format trt` wrote for this model on this machine; it sets
            shapes, workspace, builder level and refit.
        compile_cache: folder of the cache; None for ~/.cache/ncsn_fast/engines.

    Attributes:
        settings: settings of the build, including the supported shapes.
        error: largest relative error of f against the reference, over `levels` noise levels.
        origin: facts and notes of the plan, and whether this object built it.

    Raises:
        EngineError: TensorRT cannot build it.
        PrecisionError: it does not match the reference, or computes in other dtypes.
        PlanRefused: the plan file is not of this user, machine, model or version.
    """

    name = "trt"
    summary = "TensorRT 10.16 or 11.4, our update kernel, CUDA graphs"
    dtypes = ("fp16", "bf16", "tf32", "fp32")
    caches = True
    options: ClassVar[dict[str, tuple[str, ...]]] = {
        "graph": GRAPHS,
        "kernels": gpu_kernels.FAMILIES,
        "refit": ("off", "on"),
        "builder_level": tuple(map(str, LEVELS)),
        "batch": ("LEAST:USUAL:LARGEST",),
        "size": ("H,W:H,W:H,W",),
        "workspace": ("GB",),
        "plan": ("FILE",),
    }

    def __init__(
        self,
        model: ScoreModel,
        *,
        graph: str = "level",
        kernels: str | None = None,
        batch: str | int | None = None,
        size: str | None = None,
        workspace: str | float | None = None,
        builder_level: str | int | None = None,
        refit: str | None = None,
        plan: str | Path | None = None,
        compile_cache: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        asked = {
            "batch": batch, "size": size, "workspace": workspace, "builder_level": builder_level,
            "refit": refit,
        }  # fmt: skip
        kernels = kernels or DEFAULT_FAMILY
        self.check_options({**asked, "graph": graph, "kernels": kernels, "plan": plan})
        self.graph = graph
        self._trt = trt_api.load()
        self._kernels = gpu_kernels.load(kernels, self.device)
        self._source = copy.deepcopy(model).cpu().eval()  # for builds to come
        self._cache = PlanCache(compile_cache)
        self._batch = None if batch is None else parse_batch(batch)
        self._size = None if size is None else parse_size(size)
        self.release()
        with self.context():
            if plan is not None:
                self._load_file(plan)
            else:
                self.batch_size = self.fitting(self.batch_size)
                self.settings = Settings(
                    self._default_profile(),
                    tf32=self.dtype == "tf32",
                    level=3 if builder_level is None else int(builder_level),
                    workspace=None if workspace is None else parse_workspace(workspace),
                    refit=refit == "on",
                )
                self._load_or_build()
        self.model = without_weights(model)

    @property
    def profile(self) -> Profile:
        """The shapes that the engine accepts."""
        return self.settings.profile

    @property
    def gives_scaled_score(self) -> bool:
        return isinstance(self.model.config, ParameterisedConfig)

    def condition(self, sigma: Tensor) -> Tensor | None:
        return reference_check.exported_condition(self.model, sigma)

    @classmethod
    def unavailable(cls) -> str | None:
        return trt_api.problem()

    @classmethod
    def refuses(cls, model: ScoreModel) -> str | None:
        return refusal(model, wide=False, any_number=False)

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        given = {name: value for name, value in given.items() if value is not None}
        words = {k: v if k == "refit" else str(v) for k, v in given.items() if k not in _FREE}
        super().check_options(words)
        parsers = {"batch": parse_batch, "size": parse_size, "workspace": parse_workspace}
        for name, parse in parsers.items():
            if name in given:
                parse(given[name])
        beside = sorted({"builder_level", "refit", *parsers} & set(given))
        if "plan" in given and beside:
            raise ValueError(
                f"plan= brings its own {' and '.join(beside)}; leave that out, or write another "
                "plan with `python -m ncsn_fast.export --format trt`"
            )

    @classmethod
    def type_of_file(cls, options: Mapping[str, Any]) -> str | None:
        plan = options.get("plan")
        return None if plan is None else str(read_file(plan)[0].facts["dtype"])

    @classmethod
    def default_batch_size(
        cls, n: int, shape: tuple[int, int, int], device: torch.device, options: Mapping[str, Any]
    ) -> int:
        return default_batch_size(n, shape, device)  # few sizes, as each is captured

    def resized(self, batch_size: int) -> TrtEngine:
        other = super().resized(batch_size)
        assert isinstance(other, TrtEngine)
        if batch_size > self.profile.batch[2] and self._batch is None:
            log.info("building a TensorRT engine for up to %d images", batch_size)
            self.release()
            other.settings = dataclasses.replace(self.settings, profile=other._default_profile())
            with other.context():
                other._load_or_build()
        return other

    def fitting(self, batch_size: int) -> int:
        least, _, largest = self._batch or (1, 0, batch_size)
        return min(max(batch_size, least), largest)

    def new_plan(self, size: tuple[int, int]) -> TrtPlan:
        if not self.profile.holds(self.batch_size, size):
            raise ValueError(
                f"this TensorRT engine takes {self.profile}, not {self.batch_size} of "
                f"{size[0]}x{size[1]}; choose that batch_size and size, or build it with batch= "
                "and size= as 'least:usual:largest'"
            )
        shape = (self.batch_size, self.model.config.channels, *size)
        return self._plan_of(shape)

    def _plan_of(self, shape: tuple[int, int, int, int]) -> TrtPlan:
        sigma, label = reference_check.takes_sigma(self._source), default_label(self._source.config)
        return TrtPlan(self._network, shape, sigma, label, self.device, self._kernels)

    def describe(self) -> str:
        """Describes shapes, memory, error, and each layer with its dtype on a line."""
        network = self._network
        facts = (
            f"TensorRT {self._trt.__version__}, {self.dtype}, {self.profile}; "
            f"plan {network.weight_bytes / 1e6:.1f} MB, maps up to {network.memory / 1e6:.1f} MB; "
            f"differs from the reference by {self.error:.1e} at most"
        )
        return "\n".join([facts, *map(str, network.layers())])

    def serialize(self) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
        """Returns the current plan, its facts and its notes, to be written to a file."""
        notes = {**self.origin.notes, "model": self._source.digest(), "error": self.error}
        return self._network.serialize(), self.origin.facts, notes

    def _load_or_build(self) -> None:
        """Loads the engine from the cache, or builds, checks and stores it."""
        onnx = self._onnx()
        facts = self._facts(onnx)
        exact = {**facts, "model": self._source.digest()}  # precision depends on the weights, too

        def make() -> tuple[bytes, dict[str, Any]]:
            refused = self._cache.get("refused", exact)
            if refused is not None:
                raise PrecisionError(refused.decode())
            plan, seconds = self._build(onnx)
            try:
                self._load_plan(plan)
            except PrecisionError as error:
                again = f"{error} (found by an earlier build: `ncsn-fast cache clear` forgets it)"
                self._cache.put("refused", exact, again.encode())
                raise
            return plan, self._notes(seconds)

        stored = self._cache.fetch(facts, make)
        if not stored.built:
            self._load_plan(stored.content, self._weights_to_refit(stored, onnx))
        self.origin = dataclasses.replace(stored, content=b"")

    def _build(self, onnx: bytes) -> tuple[bytes, float]:
        """Builds a plan; returns it and the seconds taken."""
        if self.device.type == "cuda":
            empty_cache()  # TensorRT allocates beside torch
        machine = trt_api.machine(self._trt, self.device)
        log.info("TensorRT %s builds %s for %s", self._trt.__version__, self.dtype, self.profile)
        timings = self._cache.get("timings", machine)
        built = build_plan(self._trt, onnx, self.settings, timings=timings)
        if built.timings is not None:
            self._cache.put("timings", machine, built.timings)
        return built.plan, built.seconds

    def _load_file(self, path: str | Path) -> None:
        """Loads the engine from a plan file."""
        found, self.settings = read_file(path)
        self._batch = self.profile.batch
        onnx = self._onnx()
        check_facts(found, self._facts(onnx), path)
        self.batch_size = self.fitting(self.batch_size)
        self._load_plan(found.content, self._weights_to_refit(found, onnx))
        self.origin = dataclasses.replace(found, content=b"")

    def _facts(self, onnx: bytes) -> dict[str, Any]:
        return facts_of(self._trt, self.device, self._source, onnx, self.dtype, self.settings)

    def _notes(self, seconds: float) -> dict[str, Any]:
        """Returns information about a build that is not part of its key."""
        notes = {"model": self._source.digest(), "arch": self._source.config.arch}
        return notes | {"error": self.error, "levels": self.levels, "seconds": round(seconds, 1)}

    def _weights_to_refit(self, stored: Stored, onnx: bytes) -> bytes | None:
        """Returns the ONNX model if a stored plan holds the weights of another model."""
        return None if stored.notes.get("model") == self._source.digest() else onnx

    def _load_plan(self, plan: bytes, weights: bytes | None = None) -> None:
        """Loads a plan, refits it with other weights if given, and checks its output and dtypes."""
        self._network = TrtNetwork(self._trt, plan)
        if weights is not None:
            self._network.refit(weights)
        self.release()
        least, _, largest = self.profile.batch
        own = self._source.config.image_size
        smallest = self._plan_of((least, self._source.config.channels, *own))
        known, convolutions = check_types(self._network.layers(smallest.context), self.dtype)
        if known < convolutions or not convolutions:
            words = "TensorRT's inspector tells the types of %d of %d convolutions, of others not"
            log.warning(words, known, convolutions)
        self.levels = min(CHECK_LEVELS, len(self._source.sigmas))
        levels = {size: min(OTHER_SIZE_LEVELS, self.levels) for size in self.profile.size}
        levels[own] = self.levels
        self.error = max(
            reference_check.largest_error(
                self, self._source, size, n, min(max(min(n, self.batch_size), least), largest)
            )
            for size, n in levels.items()
        )

    def _onnx(self) -> bytes:
        return make_onnx(
            self._source,
            dtype=_ONNX_TYPES.get(self.dtype, self.dtype),
            batch=self.profile.fixed_batch,
            size=self.profile.fixed_size,
            wide=False,
        )

    def _default_profile(self) -> Profile:
        own = self._source.config.image_size
        most = max(self.batch_size, largest_batch_size(self._source.image_shape, self.device))
        profile = Profile(self._batch or (1, self.batch_size, most), self._size or (own, own, own))
        if not profile.holds(self.batch_size, own):
            raise ValueError(
                f"batch and size give {profile}; they must include this model's {own[0]}x{own[1]}"
            )
        if not (isinstance(self._source.config, ModelConfig) or profile.fixed_size == own):
            raise ValueError(
                f"this network takes images of {own[0]}x{own[1]} only; leave size= out"
            )
        return profile
