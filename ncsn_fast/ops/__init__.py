"""Fused operations: normalisation, sampler updates, counter-based noise, and their backends."""

from ncsn_fast.ops.backends import available, backend, isa
from ncsn_fast.ops.library import (
    activation,
    group_norm,
    instance_norm_plus,
    instance_norm_plus_out,
    normal,
    sampler_update,
    sampler_update_,
    trains_by_kernels,
    uniform,
)

__all__ = [
    "activation",
    "available",
    "backend",
    "group_norm",
    "instance_norm_plus",
    "instance_norm_plus_out",
    "isa",
    "normal",
    "sampler_update",
    "sampler_update_",
    "trains_by_kernels",
    "uniform",
]
