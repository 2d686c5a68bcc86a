"""Predicted time of a plan, from counts: what `config.rule` compares plans by. Nothing here was measured on a device.

A program of `block_m` tokens and 128 rows takes, for each tile of 128 inputs,

    issue    instructions of its warps' loop (SASS of sm_90, triton 3.7.1) over four schedulers,
    tensor   block_m * 128 * 128 multiply-adds at the rate of a large bf16 product,

one after the other where a program is alone on a processor, overlapped where several share it or where products are
under way while the next tile is unpacked (`folded`, not on sm_90: see `triton.kernels.finished`). The processor with
the most programs decides. Below that lie two floors that all processors share: bytes from memory, and bytes from the L2
cache, of which every program reads its own activations.
"""

from __future__ import annotations

from sarqc_kernels.device import Device
from sarqc_kernels.w4a16.layout import TILE_K
from sarqc_kernels.w4a16.plan import Plan

__all__ = ["RESIDENT", "programs_of", "seconds_of"]

CLOCK = 1.8e9
TENSOR = 1640.0  # multiply-adds of a processor in a cycle: 780 TFLOP/s among 132
MEMORY = 32e9  # bytes a second of a processor: 4.3 TB/s among 132; one that others leave alone gets half as much again
ALONE = 1.5
CACHE = 42e9  # the same from the L2 cache: 5.5 TB/s among 132
ISSUE = {16: 339, 32: 367, 48: 510, 64: 472, 80: 532, 96: 542, 128: 482, 144: 552, 160: 558, 192: 590}
"""Instructions of a processor's scheduler for a tile, by tokens of a program: those of a warp times warps over four."""
TALL_ISSUE = 812  # 256 rows, 128 tokens
RESIDENT = {16: 4, 32: 3, 48: 2, 64: 2, 80: 2, 96: 2}
"""Programs that the registers and shared memory of a processor hold, where it is more than one."""
FILL = 1.0e-6  # until a program multiplies, and from its last product to its end
WALK_FILL = 0.4e-6  # between two blocks of a persistent program
REDUCE = 0.7e-6  # launch of the sum over splits, overlapped with the product
CUBLAS, OWN = 0.85, 0.75  # shares of the tensor cores' rate that cuBLAS and the loops here are taken to reach


def seconds_of(plan: Plan, shape: tuple[int, int, int, int], device: Device, bits: int) -> float:
    """shape: (tokens, outputs, inputs, experts), experts = 0: dense."""
    tokens, outputs, inputs, experts = shape
    if plan.kernel == "expand":
        return _expanded(tokens, outputs, inputs, device, bits)
    k_tiles = -(-inputs // TILE_K)
    own, splits, blocks_m, blocks_n = _division(plan, shape)
    programs = blocks_m * blocks_n * splits
    busy = min(experts, tokens) if experts else 1
    most = -(-programs // device.multiprocessors)
    resident = 1 if plan.resident else RESIDENT.get(plan.tokens, 1)
    overlapped = min(most, resident) > 1 or (plan.folded and not device.operand_in_flight)
    cycles = most * own * _cycles(plan, overlapped) / CLOCK
    fill = FILL + WALK_FILL * (most - 1) if plan.resident else FILL * -(-most // resident)
    words = blocks_n * plan.block_n * k_tiles * 16 * bits
    active = 2 * inputs * min(tokens, blocks_m * plan.tokens) * blocks_n
    reach = min(device.multiprocessors, ALONE * programs)
    parts = 8 * splits * tokens * outputs if plan.splits > 1 else 2 * tokens * outputs
    memory = words * busy / MEMORY / reach
    cache = (words * blocks_m + active + parts) / CACHE / reach
    return max(cycles, memory, cache) + fill + (REDUCE if plan.splits > 1 else 0.0)


def programs_of(plan: Plan, shape: tuple[int, int, int, int]) -> int:
    """Programs that have work, of experts were all alike; of cuBLAS as many as it likes."""
    if plan.kernel == "expand":
        return 1 << 30
    _, splits, blocks_m, blocks_n = _division(plan, shape)
    return splits * blocks_m * blocks_n


def _division(plan: Plan, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """(tiles of a program, splits that have any, blocks of tokens, blocks of rows)."""
    tokens, outputs, inputs, experts = shape
    k_tiles = -(-inputs // TILE_K)
    own = -(-k_tiles // plan.splits)
    share, busy = (tokens, 1) if not experts else (-(-tokens // min(experts, tokens)), min(experts, tokens))
    return own, -(-k_tiles // own), -(-share // plan.tokens) * busy, -(-outputs // plan.block_n)


def _cycles(plan: Plan, overlapped: bool) -> float:
    """Of a processor for one tile of one program. overlapped: whether its tensor cores work while it unpacks."""
    tall = plan.block_n > 128
    issue = TALL_ISSUE if tall else ISSUE[plan.tokens]
    tensor = plan.tokens * plan.block_n * TILE_K / TENSOR / OWN
    return max(issue, tensor) if overlapped else issue + tensor


def _expanded(tokens: int, outputs: int, inputs: int, device: Device, bits: int) -> float:
    """The weight written out and read again, and the product by cuBLAS, at its common share of the roof."""
    product = tokens * outputs * inputs / (TENSOR * CUBLAS * CLOCK * device.multiprocessors)
    moved = outputs * inputs * (bits / 8 + 2 + 2) / MEMORY / device.multiprocessors
    return product + moved + 3 * FILL
