"""How suspended micro-batches are held, chosen from numbers: all of them in place, or some elsewhere, or less of each.

On a CPU what goes over the budget waits in a file: a disk takes a layer's activations in less time than a CPU needs to
compute them again. On a GPU it is the other way round, so there a block is recomputed, and what waits at its entry goes
to host memory where it does not fit, and to a file where that has no room either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sarqc.pipeline.activation_store import FileStore, HostStore
from sarqc.pipeline.forward import IN_PLACE, Memory
from sarqc.pipeline.plan import Plan

DEVICE_SHARE = 0.4
"""Of a GPU's free memory, what suspended micro-batches may take."""


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of all streams of a rank where they are. in_place: on the device. host, file: beside it. recompute: whether
    micro-batches wait at a block's entry alone."""

    in_place: int
    host: int = 0
    file: int = 0
    recompute: bool = False


def activation_memory(plan: Plan, tokens: int) -> ActivationMemory:
    """For `tokens` tokens of a rank. A GPU that is not here is taken to have room for all."""
    suspended = suspended_bytes(plan, tokens)
    if plan.device.type == "cpu":
        in_place = min(suspended, plan.activation_budget)
        return ActivationMemory(in_place, file=suspended - in_place)
    room = _room(plan.device)
    if room is None or suspended <= room:
        return ActivationMemory(suspended)
    entering = tokens * plan.lazy.hidden_size * plan.dtype.itemsize * _streams(plan)
    in_place = min(entering, room // 2)
    host = min(entering - in_place, plan.activation_budget)
    return ActivationMemory(in_place, host, entering - in_place - host, recompute=True)


def suspended_memory(plan: Plan, tokens: int, place: Path) -> Memory:
    """The same as a run has it; place: a folder for the file."""
    buffers = activation_memory(plan, tokens)
    if not buffers.host and not buffers.file and not buffers.recompute:
        return IN_PLACE
    budget = (_room(plan.device) or 0) // 2 if buffers.recompute else plan.activation_budget
    file = FileStore(place)
    store = HostStore(plan.activation_budget, file) if buffers.recompute else file
    return Memory(budget // _streams(plan), store, buffers.recompute)


def suspended_bytes(plan: Plan, tokens: int) -> int:
    """Bytes that all micro-batches hold where they hold most: at the widest site its input, the residual stream, what
    left the block before, and twice as much for what the model keeps beside; in the reference what left two blocks."""
    widest = max((target.shape[1] for target in plan.targets.selected), default=0)
    hidden = plan.lazy.hidden_size
    quantized, reference = widest + 4 * hidden, 2 * hidden * plan.method.error_correction
    return int(tokens * plan.dtype.itemsize * (quantized + reference))


def _streams(plan: Plan) -> int:
    return 1 + int(plan.method.error_correction)


def _room(device: torch.device) -> int | None:
    """Bytes of a GPU for suspended micro-batches; None where there is no such GPU here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE)
