"""engine="trt": the network as a TensorRT engine, sampling in CUDA graphs with our update."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ncsn_fast._backends import DEFAULT_FAMILY
from ncsn_fast.engines import gpu_kernels, precision, trt_api
from ncsn_fast.engines.base import EngineError, without_weights
from ncsn_fast.engines.cuda_graphs import empty_cache
from ncsn_fast.engines.foreign import ContiguousEngine
from ncsn_fast.engines.looped import GRAPHS, LoopedEngine
from ncsn_fast.engines.onnx_model import make_onnx, structure
from ncsn_fast.engines.plan_cache import PlanCache, Stored, kernels_digest, read_plan
from ncsn_fast.engines.trt_builder import LEVELS, Profile, Settings, build_plan
from ncsn_fast.engines.trt_options import parse_batch, parse_size, parse_workspace
from ncsn_fast.engines.trt_runtime import TrtNetwork, TrtPlan, check_types
from ncsn_fast.models.score import ScoreModel

log = logging.getLogger(__name__)
GATE = 12  # noise levels at which every engine is compared with the reference
_ONNX_TYPES = {"tf32": "fp32"}
_FREE = ("batch", "size", "workspace", "plan")  # options whose values are not a few words


class TrtEngine(LoopedEngine):
    """Any network, built by TensorRT for this GPU once and kept in a cache of the user's own.

    The ONNX model says the types (engines/onnx_network.py). Each build and each load is compared
    with the reference at a dozen noise levels, and the types of its convolutions are read back from
    TensorRT's inspector. Sampling runs TensorRT's kernels and our update in one CUDA graph.

    Args:
        graph, kernels: as of CudaEngine; kernels are those of the update.
        batch: numbers of images "least:usual:largest", or one. None: from 1 to batch_size, and
            built anew when a larger one is needed.
        size: "H,W:H,W:H,W" or "H,W" of images; None for the model's.
        workspace: GB that a layer may use beside its maps; None for all there is.
        builder_level: 0 to 5, how long TensorRT searches for faster kernels.
        refit: "on" builds an engine whose weights can be exchanged, which serves all models of this
            structure: another one's weights are put in instead of a build.
        plan: a file that `export --format trt` wrote for this model on this machine.
        compile_cache: folder of the cache; None for ~/.cache/ncsn_fast/engines.

    Attributes:
        profile: shapes that it takes.   error: largest relative error of f against the reference.

    Raises:
        EngineError: TensorRT cannot build it, or computes something else than the reference.
        PlanRefused: the plan file is not of this user, machine, model or version.
    """

    name = "trt"
    summary = "TensorRT 10.16 or 11.4, our update kernel, CUDA graphs"
    dtypes = ("fp16", "bf16", "tf32", "fp32")
    compiles = True
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
        builder_level: str | int = 3,
        refit: str = "off",
        plan: str | Path | None = None,
        compile_cache: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        kernels = kernels or DEFAULT_FAMILY
        chosen = {"graph": graph, "kernels": kernels, "refit": refit}
        self.check_options({**chosen, "builder_level": builder_level})
        self.graph = graph
        self._trt = trt_api.load()
        self._kernels = gpu_kernels.load(kernels, self.device)
        self._source = copy.deepcopy(model).cpu().eval()  # for builds to come
        self._cache = PlanCache(compile_cache)
        self._batch = None if batch is None else parse_batch(batch)
        self._size = None if size is None else parse_size(size)
        self._build: dict[str, Any] = {
            "tf32": self.dtype == "tf32",
            "level": int(builder_level),
            "workspace": None if workspace is None else parse_workspace(workspace),
            "refit": refit == "on",
        }
        self.release()
        with self.context():
            if plan is None:
                self._obtain()
            else:
                self._read(plan)
        self.model = without_weights(model)

    @classmethod
    def unavailable(cls) -> str | None:
        return trt_api.problem()

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        words = {k: str(v) for k, v in given.items() if k not in _FREE}
        super().check_options(words)
        parsers = {"batch": parse_batch, "size": parse_size, "workspace": parse_workspace}
        for name, parse in parsers.items():
            if given.get(name) is not None:
                parse(given[name])

    def resized(self, batch_size: int) -> TrtEngine:
        other = super().resized(batch_size)
        assert isinstance(other, TrtEngine)
        if batch_size > self.profile.batch[2] and self._batch is None:
            log.info("building a TensorRT engine for up to %d images", batch_size)
            with other.context():
                other._obtain()
        return other

    def memory(self) -> int:
        loop = self.loop(self.model.config.image_size)
        return loop.plan.weight_bytes + loop.plan.map_bytes + loop.bytes

    def new_plan(self, size: tuple[int, int]) -> TrtPlan:
        if not self.profile.holds(self.batch_size, size):
            raise ValueError(
                f"this TensorRT engine takes {self.profile}, not {self.batch_size} of "
                f"{size[0]}x{size[1]}; choose that batch_size and size, or build it with batch= "
                "and size= as 'least:usual:largest'"
            )
        shape = (self.batch_size, self.model.config.channels, *size)
        return TrtPlan(self._network, shape, self.model.conditioning, self.device, self._kernels)

    def describe(self) -> str:
        """The engine's shapes, memory and error, and its layers, one a line, with their types."""
        network = self._network
        facts = (
            f"TensorRT {self._trt.__version__}, {self.dtype}, {self.profile}; "
            f"plan {network.weight_bytes / 1e6:.1f} MB, maps {network.memory / 1e6:.1f} MB; "
            f"differs from the reference by {self.error:.1e} at most"
        )
        return "\n".join([facts, *map(str, network.layers())])

    def _obtain(self) -> None:
        """Takes the engine from the cache, or builds, checks and stores it."""
        self.profile = self._default_profile()
        settings = Settings(self.profile, **self._build)
        onnx = self._onnx()

        def make() -> tuple[bytes, dict[str, Any]]:
            machine = trt_api.machine(self._trt, self.device)
            if self.device.type == "cuda":
                empty_cache()  # TensorRT allocates beside torch
            log.info("TensorRT %s builds %s for %s", machine["tensorrt"], self.dtype, self.profile)
            built = build_plan(
                self._trt, onnx, settings, timings=self._cache.get("timings", machine)
            )
            if built.timings is not None:
                self._cache.put("timings", machine, built.timings)
            self._take(built.plan)
            return built.plan, self.notes(built.seconds)

        stored = self._cache.fetch(self.facts(onnx), make)
        if not stored.built:
            self._take(stored.content, self._new_weights(stored, onnx))
        self.stored = stored

    def _read(self, path: str | Path) -> None:
        """Takes the engine from a file of the user's."""
        if not Path(path).expanduser().is_file():
            raise EngineError(
                f"{path}: there is no such file; write it with `python -m ncsn_fast.export "
                "--format trt`"
            )
        found = read_plan(path)
        kept = {key: found.facts.get(key) for key in ("level", "workspace", "refit")}
        self.profile = Profile(
            tuple(found.facts["batch"]),
            tuple(map(tuple, found.facts["size"])),  # type: ignore[arg-type]
        )
        self._batch, self._build = self.profile.batch, {**self._build, **kept}
        onnx = self._onnx()
        self.stored = read_plan(path, self.facts(onnx))
        self._take(found.content, self._new_weights(found, onnx))

    def facts(self, onnx: bytes) -> dict[str, Any]:
        """Everything that the plan of an ONNX model depends on."""
        refit = self._build["refit"]
        own = {"model": self._source.digest(), "graph": hashlib.sha256(onnx).hexdigest()}
        return {
            **({"graph": structure(onnx)} if refit else own),
            **self._build,
            **trt_api.machine(self._trt, self.device),
            "kernels": kernels_digest(),
            "dtype": self.dtype,
            "shapes": str(self.profile),
            "batch": list(self.profile.batch),
            "size": [list(size) for size in self.profile.size],
        }

    def notes(self, seconds: float) -> dict[str, Any]:
        """What is worth knowing of a build."""
        model = {"model": self._source.digest(), "arch": self._source.config.arch}
        return {**model, "error": self.error, "levels": self.levels, "seconds": round(seconds, 1)}

    def _new_weights(self, stored: Stored, onnx: bytes) -> bytes | None:
        """The ONNX model, if a stored plan holds the weights of another model."""
        return None if stored.notes.get("model") == self._source.digest() else onnx

    def _take(self, plan: bytes, weights: bytes | None = None) -> None:
        """Loads a plan, with other weights if there are any, and checks what it computes."""
        self._network = TrtNetwork(self._trt, plan)
        if weights is not None:
            self._network.refit(weights)
        self.release()
        if not check_types(self._network.layers(), self.dtype):
            log.warning("TensorRT's inspector shows no convolution: their types are unchecked")
        self.levels = min(GATE, len(self._source.sigmas))
        reference = ContiguousEngine(
            self._source, device=self.device, dtype="fp32",
            batch_size=min(self.levels, self.batch_size), threads=self.threads,
        )  # fmt: skip
        self.error = precision.check_precision(self, reference, self.levels)

    def _onnx(self) -> bytes:
        return make_onnx(
            self._source,
            dtype=_ONNX_TYPES.get(self.dtype, self.dtype),
            batch=self.profile.fixed_batch,
            size=self.profile.fixed_size,
        )

    def _default_profile(self) -> Profile:
        own = self._source.config.image_size
        batch = self._batch or (1, self.batch_size, self.batch_size)
        profile = Profile(batch, self._size or (own, own, own))
        if not profile.holds(self.batch_size, own):
            raise ValueError(
                f"batch and size give {profile}; they must include this model's {own[0]}x{own[1]} "
                f"and batch_size {self.batch_size}"
            )
        return profile
