"""What transformers' `from_pretrained` may keep packed: the meeting of a quantizer and a reader of files.

Called by `sarqc.registration` while transformers is being imported, so nothing here asks for more of transformers than
its tables of quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarqc.checkpoint.formats import FORMATS, detect
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import CheckpointError


def can_pack(quantization: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `quantization_config` is one of packed integer weights alone, which we run.

    False for formats that are not read here and for ones that quantize more (activations, the KV cache).
    """
    known = detect({"quantization_config": quantization})
    if known is None or quantization.get("kv_cache_scheme"):
        return False
    try:
        known.linears((), quantization)
    except CheckpointError:
        return False
    return True


def take_seats() -> None:
    """Put ours where transformers looks for a quantizer."""
    from sarqc.model import registry

    registry.take(FORMATS, can_pack, open_checkpoint)


def leave_seats() -> None:
    """Undo it."""
    from sarqc.model import registry

    registry.leave()
