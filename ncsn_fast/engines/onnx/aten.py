"""Networks that torch.export finds, in ONNX's standard operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ncsn_fast.engines.lowering.export import Exported
from ncsn_fast.engines.onnx import layer_operations, pointwise_operations, shape_operations
from ncsn_fast.engines.onnx.translation import Translation, is_translated
from ncsn_fast.engines.onnx.writer import Value, Writer

# Their import registers the translations.
TABLES = (layer_operations, pointwise_operations, shape_operations)


def export(
    net: nn.Module, inputs: Sequence[Tensor | None], sizes: tuple[int, int] | None = None
) -> Exported:
    """Exports a network for `translate`: what has no translation is decomposed, if torch can.

    Args:
        inputs, sizes: see Exported.

    Raises:
        UnsupportedNetwork: torch cannot export the network.
    """
    return Exported(net, inputs, sizes, runs=is_translated)


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
