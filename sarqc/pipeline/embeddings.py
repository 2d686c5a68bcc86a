"""Embeddings that are quantized too.

A token looks one row up and multiplies nothing, so there is no Gram, and rows are rounded (RTN) to the scales that the
method has for weights alone. That is done twice, from the same weights and so to the same codes: before the text enters
the quantized stream, which everything behind is then calibrated on, and as the last units of the run, where the codes
are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from sarqc.method.rtn import quantize_rtn
from sarqc.model.candidates import Target
from sarqc.model.sites import stack
from sarqc.pipeline.quantize_site import SiteQuantizer, scale_dtype

ROWS = 1 << 13
"""Rows at a time: what rounding them takes is memory beside an embedding that may have a quarter of a million."""


def round_embeddings(solving: SiteQuantizer, selected: Sequence[Target]) -> bool:
    """Put the rounded weights of the embeddings among `selected`, which are loaded, in the place of their own; whether
    there are any."""
    embeddings = [target for target in selected if target.embedding]
    for target in embeddings:
        quant, kept = solving.quant.of(target.embedding), scale_dtype(solving.source, target.linear)
        for rows in stack(solving.lazy.model, target.parameter).split(ROWS, 1):
            rounded = quantize_rtn(rows.float(), quant, solving.method.scales, kept)
            rows.copy_(rounded.dequantize(rows.dtype))
    return bool(embeddings)
