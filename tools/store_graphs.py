"""Writes the lowered graphs of the models that ship: `python -m tools.store_graphs`.

Their files lie in ncsn_fast/assets/graphs. A test holds that they are what lowering gives.
"""

from __future__ import annotations

from ncsn_fast.checkpoints.loading import SHIPPED, load
from ncsn_fast.engines.lowering import stored
from ncsn_fast.engines.lowering.lower import storable
from ncsn_fast.engines.static_engine import conditions
from ncsn_fast.models.score import ScoreModel

MODELS = (SHIPPED,)


def of(model: ScoreModel) -> tuple[str, stored.Structure]:
    """Returns the key of a model's graph, and the graph."""
    shape = (model.config.channels, *model.config.image_size)
    key, structure = storable(model.net, shape, conditions(model))
    assert key is not None
    return key, structure


def main() -> None:
    for old in stored.SHIPPED.glob("*.json"):
        old.unlink()
    for source in MODELS:
        key, structure = of(load(source))
        stored.write(stored.SHIPPED / f"{key}.json", structure)
        print(f"{source.name}: {key}")


if __name__ == "__main__":
    main()
