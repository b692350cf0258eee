"""Plans: serialised engines, as opaque bytes that detect damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib

MAGIC = b"ftrt-double\0"
DIGEST = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Serialised engine.

    Attributes:
        version, gpu, capability, compatibility: of the build, and its target.
        name: the network's name.
        profiles: by profile, input -> [min, opt, max].
        typed: whether the network was strongly typed.
        float_convolution: index, from 1, of the convolution that is in float32 all the same.
        onnx: the graph, with its weights.
    """

    version: str
    gpu: str
    capability: str
    compatibility: str
    name: str
    typed: bool
    refittable: bool
    tf32: bool
    verbosity: str
    float_convolution: int
    profiles: list[dict[str, list[list[int]]]]
    onnx: bytes

    def to_bytes(self) -> bytes:
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "onnx"}
        body = zlib.compress(json.dumps(fields).encode() + b"\0" + self.onnx, 1)
        return MAGIC + hashlib.sha256(body).digest() + body


def read(content: bytes) -> Plan | None:
    """Returns the plan in these bytes, or None if they are not a plan."""
    head, body = content[: len(MAGIC) + DIGEST], content[len(MAGIC) + DIGEST :]
    if head != MAGIC + hashlib.sha256(body).digest():
        return None
    fields, _, graph = zlib.decompress(body).partition(b"\0")
    return Plan(**json.loads(fields), onnx=graph)
