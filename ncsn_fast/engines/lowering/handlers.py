"""The table from ATen operations, which torch.export finds, to their handlers."""

from __future__ import annotations

from ncsn_fast.engines.lowering import (
    layer_handlers,
    pointwise_handlers,
    product_handlers,
    shape_handlers,
)
from ncsn_fast.engines.lowering.aten import Handlers

HANDLERS = Handlers(
    {
        **shape_handlers.HANDLERS,
        **layer_handlers.HANDLERS,
        **pointwise_handlers.HANDLERS,
        **product_handlers.HANDLERS,
    }
)
