"""Behaviour of a double that tests can change, and the calls it received."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Behaviour:
    """Settings of one double, which may be changed at any time.

    Attributes:
        driver: whether a driver exists; without one, Builder and Runtime raise.
        gpu, capability: name and compute capability of the GPU that builds and runs.
        needs_workspace: bytes below which no tactic is found.
        fail_build, fail_context, fail_run: the next such steps fail, until reset.
        float_convolution: this convolution, counted from 1, is compiled in float32 all the same.
        tells_types: whether the inspector shows weights and tactics of convolutions.
        hides_maps: whether it hides the types of maps with dynamic shapes, like TensorRT.
        output_error: value added to every output.
        n_builds: number of networks built, counted by the double.
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

    `ok` is its return value.
    """

    stream: int
    profile: int
    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    ok: bool
