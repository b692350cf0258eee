"""What tests turn: knobs of a double, and the calls it saw."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Behaviour:
    """Knobs of one double; they may be turned at any time.

    Attributes:
        driver: whether there is one; without, Builder and Runtime raise.
        gpu, capability: name and compute capability of the GPU that builds and runs.
        needs_workspace: bytes without which no tactic is found.
        fail_build, fail_context, fail_run: the next of these steps fails, until turned back.
        float_convolution: this one, counted from 1, is compiled in float32 all the same.
        tells_types: whether the inspector shows weights and tactics of convolutions.
        hides_maps: whether it hides the types of maps where shapes are open, as TensorRT does.
        output_error: what is added to every output.
        n_builds: counted by the double: networks that were built.
    """

    driver: bool = True
    gpu: str = "NVIDIA H100 80GB HBM3"
    capability: str = "9.0"
    needs_workspace: int = 0
    fail_build: bool = False
    fail_context: bool = False
    fail_run: bool = False
    float_convolution: int = 0
    tells_types: bool = True
    hides_maps: bool = True
    output_error: float = 0.0
    n_builds: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """One execute_async_v3: the stream's handle, the profile, and each tensor's shape and address.

    `ok` is what it returned.
    """

    stream: int
    profile: int
    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    ok: bool
