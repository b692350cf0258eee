"""Networks that torch.export finds, in ONNX's standard operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ncsn_fast.engines.lowering.export import Exported
from ncsn_fast.engines.onnx import layer_operations, pointwise_operations, shape_operations
from ncsn_fast.engines.onnx.translation import Translation
from ncsn_fast.engines.onnx.writer import Value, Writer

# Their import registers the translations.
TABLES = (layer_operations, pointwise_operations, shape_operations)


def translate(
    exported: Exported,
    w: Writer,
    inputs: Sequence[Value],
    sizes: Mapping[int, int] | None = None,
) -> Value:
    """Writes the graph of an exported network; returns its output.

    Args:
        sizes: numbers in place of open sizes of the images, by their axis.

    Raises:
        UnsupportedNetwork: an operation has no translation; the message names it.
    """
    return Translation(exported, w, inputs, sizes).run()
