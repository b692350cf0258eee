"""Building a TensorRT plan from an ONNX model.

Networks are strongly typed: the ONNX graph sets the precision, and no builder flag changes it
(TensorRT 11 has no such flags any more). Only TF32 is a flag, on by default, and cleared here
unless requested.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from tqdm import tqdm

from ncsn_fast.engines.base import EngineError, progress_shown
from ncsn_fast.engines.tensorrt.api import checked, create, get_logger

_log = logging.getLogger(__name__)
LEVELS = range(6)
Size = tuple[int, int]
_MAX_BARS = 3  # phases nest about five deep


@dataclasses.dataclass(frozen=True)
class Profile:
    """Smallest, usual and largest shapes of a plan, which is tuned for the usual one.

    Attributes:
        batch: numbers of images.   size: their (H, W).
    """

    batch: tuple[int, int, int]
    size: tuple[Size, Size, Size]

    def __post_init__(self) -> None:
        for name, triple in (
            ("batch", self.batch),
            ("height", tuple(h for h, _ in self.size)),
            ("width", tuple(w for _, w in self.size)),
        ):
            if not 1 <= triple[0] <= triple[1] <= triple[2]:
                raise ValueError(
                    f"a profile's {name} must be least:usual:largest, from 1 upwards; got "
                    f"{':'.join(map(str, triple))}"
                )

    @property
    def fixed_batch(self) -> int | None:
        """The number of images if there is only one, else None."""
        return self.batch[0] if self.batch[0] == self.batch[2] else None

    @property
    def fixed_size(self) -> Size | None:
        return self.size[0] if self.size[0] == self.size[2] else None

    def holds(self, batch: int, size: Size) -> bool:
        """Returns whether a micro-batch of images of a size fits."""
        (least, _, most), low, high = self.batch, self.size[0], self.size[2]
        within = all(a <= n <= b for a, n, b in zip(low, size, high, strict=True))
        return least <= batch <= most and within

    def shapes(self, name: str, channels: int) -> list[tuple[int, ...]]:
        """Returns the smallest, usual and largest shape of a named input."""
        if name != "x":
            return [(n,) for n in self.batch]
        return [(n, channels, *size) for n, size in zip(self.batch, self.size, strict=True)]

    def __str__(self) -> str:
        sizes = [f"{h}x{w}" for h, w in self.size]
        return f"{_short(self.batch)} images of {_short(sizes)}"


def _short(triple: Sequence[object]) -> str:
    """Joins the three, or shows one if they are equal."""
    return ":".join(map(str, triple if len(set(triple)) > 1 else triple[:1]))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that a plan is built with.

    Attributes:
        tf32: convolutions of float32 maps may round their inputs to TF32.
        level: 0 to 5, time the builder takes to find faster kernels; TensorRT's default is 3.
        workspace: bytes that a layer may use beside its maps; None for all of the GPU's memory.
        refit: weights can be replaced later, and are therefore not folded into one another.
    """

    profile: Profile
    tf32: bool = False
    level: int = 3
    workspace: int | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"builder_level must be 0 to {LEVELS[-1]}; got {self.level}")


@dataclasses.dataclass(frozen=True)
class Built:
    """Result of a build; the timings are TensorRT's, for the next build on the same GPU."""

    plan: bytes
    timings: bytes | None
    seconds: float


def build_plan(
    trt: ModuleType,
    onnx: bytes,
    settings: Settings,
    *,
    timings: bytes | None = None,
    adjust: Callable[[Any], object] | None = None,
) -> Built:
    """Builds the plan of an ONNX model for the current GPU, with a progress bar on terminals.

    Args:
        onnx: result of `onnx.model.make_onnx`.   timings: those of an earlier build.
        adjust: called with the IBuilderConfig before the build.

    Raises:
        EngineError: TensorRT cannot parse or build it; with its own reasons.
        EngineUnavailable: there is no working driver.
        KeyboardInterrupt: Ctrl-C; TensorRT stops at its next step.
    """
    log, began = get_logger(trt), time.perf_counter()
    log.errors.clear()
    builder = create(trt.Builder, log)
    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    parser = trt.OnnxParser(network, log)
    # An empty file parses to an empty network.
    if not parser.parse(onnx) or network.num_outputs == 0:
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(
            f"TensorRT {trt.__version__} does not take this network: {errors or log.reasons()}; "
            "use engine='cuda' or 'ort'"
        )
    config = builder.create_builder_config()
    _configure(trt, config, settings)
    _set_profile(builder, config, network, settings.profile, log)
    cache = config.create_timing_cache(timings or b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        _log.info("TensorRT did not take the timings of an earlier build; it measures anew")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    if adjust is not None:
        adjust(config)
    monitor = _new_monitor(trt)
    config.progress_monitor = monitor
    with _stopped_by_ctrl_c(monitor):
        plan = builder.build_serialized_network(network, config)
        monitor.close()
    remedy = "free GPU memory, give a larger workspace or smaller shapes, or use engine='cuda'"
    checked(plan, "could not build an engine", log, remedy)
    cache = config.get_timing_cache()
    return Built(
        bytes(plan),
        None if cache is None else bytes(cache.serialize()),
        time.perf_counter() - began,
    )


def _configure(trt: ModuleType, config: Any, settings: Settings) -> None:
    config.builder_optimization_level = settings.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for check_types
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    (config.set_flag if settings.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if settings.refit:
        config.set_flag(trt.BuilderFlag.REFIT)


def _set_profile(builder: Any, config: Any, network: Any, shapes: Profile, log: Any) -> None:
    """Sets one profile for all inputs with dynamic sizes, if there are any."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    channels = next(tuple(x.shape)[1] for x in inputs if x.name == "x")
    profile = builder.create_optimization_profile()
    for x in inputs:
        profile.set_shape(x.name, *shapes.shapes(x.name, channels))
    if any(n < 0 for x in inputs for n in tuple(x.shape)):
        taken = config.add_optimization_profile(profile) >= 0
        checked(taken, f"does not take the profile of {shapes}", log, "give other shapes")


def _new_monitor(trt: ModuleType) -> Any:
    """Returns a monitor with progress bars; its `stop()` ends the build at the next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, tqdm[Any]] = {}  # phases under way, outermost first
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            shown = progress_shown.get() and len(self.bars) < _MAX_BARS
            self.bars[phase_name] = tqdm(
                total=num_steps,
                desc=phase_name,
                position=len(self.bars),
                leave=False,
                disable=None if shown else True,  # None: only on terminals
            )

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar = self.bars.get(phase_name)
            if bar is not None:
                bar.update(step + 1 - bar.n)
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            bar = self.bars.pop(phase_name, None)
            if bar is not None:
                bar.close()

        def stop(self) -> None:
            self.stopped = True

        def close(self) -> None:
            for phase in reversed(list(self.bars)):
                self.phase_finish(phase)

    return Monitor()


@contextlib.contextmanager
def _stopped_by_ctrl_c(monitor: Any) -> Iterator[None]:
    """Stops the build on Ctrl-C and raises KeyboardInterrupt after it, not inside TensorRT.

    Only the main thread receives signals: elsewhere, Ctrl-C takes effect after the build.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: monitor.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if monitor.stopped:
        raise KeyboardInterrupt
