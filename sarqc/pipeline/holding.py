"""How suspended micro-batches are held, chosen from numbers: all of them in place, or some elsewhere, or less of each.

On a CPU what goes over the budget waits in a file: a disk takes a layer's activations in less time than a CPU needs to
compute them again. On a GPU it is the other way round, so there a block is recomputed, and what waits at its entry goes
to host memory where it does not fit, and to a file where that has no room either.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sarqc.pipeline.activation_store import FileStore, HostStore, Stores
from sarqc.pipeline.plan import Plan
from sarqc.pipeline.streams import Memory

DEVICE_SHARE = 0.4
"""Of a GPU's free memory, what suspended micro-batches may take."""


def hold(plan: Plan, windows: int, seqlen: int, ranks: int, place: Path) -> Memory:
    """For `windows` of `seqlen` tokens over all ranks; place: a folder for the file."""
    suspended, streams = suspended_bytes(plan, -(-windows // ranks) * seqlen), 1 + plan.method.error_correction
    if plan.device.type == "cpu":
        if suspended <= plan.activation_budget:
            return Memory()
        return Memory(plan.activation_budget // streams, FileStore(place))
    free, _ = torch.cuda.mem_get_info(plan.device)
    room = int(free * DEVICE_SHARE)
    if suspended <= room:
        return Memory()
    return Memory(
        room // (2 * streams), Stores([HostStore(), FileStore(place)], [plan.activation_budget]), recompute=True
    )


def suspended_bytes(plan: Plan, tokens: int) -> int:
    """Bytes that all micro-batches hold where they hold most: at the widest site its input, what left the block before,
    the residual stream, and as much again for what the model keeps beside it; and twice the stream in the reference."""
    hidden: int = plan.skeleton.model.config.hidden_size
    widest = max((target.shape[1] for target in plan.targets.selected), default=hidden)
    quantized, reference = widest + 4 * hidden, 2 * hidden * plan.method.error_correction
    total: int = tokens * plan.dtype.itemsize * (quantized + reference)
    return total
