"""Writes the traced graphs of the models that ship: `python -m tools.store_graphs`.

Their files lie in ncsn_fast/assets/graphs. A test holds that they are what tracing gives.
"""

from __future__ import annotations

import torch

from ncsn_fast.checkpoints.loading import load
from ncsn_fast.checkpoints.shipped import shipped
from ncsn_fast.engines.lowering import stored
from ncsn_fast.engines.lowering.export import PROBE, trace
from ncsn_fast.engines.static_engine import conditions
from ncsn_fast.models.score import ScoreModel

MODELS = tuple(shipped().values())


def of(model: ScoreModel) -> tuple[str, stored.Structure]:
    """Traces a model's network; returns the key of the graph, and the graph as plain data."""
    shape = (model.config.channels, *model.config.image_size)
    inputs = conditions(model)
    key = stored.key(model.net, shape, inputs, PROBE)
    assert key is not None
    size = [torch.zeros(PROBE, *shape)]
    rows = [None if dtype is None else torch.zeros(PROBE, dtype=dtype) for dtype in inputs]
    return key, stored.structure_of(trace(model.net.eval(), [*size, *rows]))


def main() -> None:
    for old in stored.SHIPPED.glob("*.json"):
        old.unlink()
    for source in MODELS:
        key, structure = of(load(source))
        stored.write(stored.SHIPPED / f"{key}.json", structure)
        print(f"{source.name}: {key}")


if __name__ == "__main__":
    main()
