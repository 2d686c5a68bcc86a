"""Which block, how many splits: pure functions of the shape, the device and a committed table (`tuned.py`) where there
is one. Nothing is tuned at run time.

For shapes that no table has, `rule` takes the plan of least predicted time (`predict`), which is counted, not measured.

* dot: the weight is the first operand of the tensor core, 128 rows a block, so a block pads tokens to 16, not to 64.
* splits (split-K): inputs are cut so that programs reach two on a processor where registers allow, with at least four
  tiles (512 inputs) each; partial sums are fp32, added in order by a second kernel whose launch overlaps (PDL).
* folded, in blocks of 48 and from 80 tokens on: scales go into the weights (rounded once to 16 bits, as `expand` does),
  so that one sum runs through all tiles; a second set of sums would have no room. The tensor core multiplies one tile
  while the next is unpacked, except on sm_90 (`triton.kernels.finished`), where programs beside each other fill the
  gap. With fewer tokens the sum of each group is scaled in fp32, which costs the same few instructions.
* tail: up to 64 tokens more than 32, 64 or 128, on the same unpacked weights; 129 tokens cost 144 and not 256.
* persistent: on sm_90 blocks of 256 rows and 128 tokens, one program on each processor, which walks the blocks, eight
  blocks of tokens with all blocks of rows at a time. Counted: a tile of such a block takes 48 KiB from the L2 cache for
  8.4 Mflop, so at the full rate of the tensor cores all processors together ask it for 4.6 TB/s, where blocks of 128
  rows ask for 7.6. And 8 x 16 blocks under way at once read half of what 32 x 4 do, the order of a plain grid. Other
  devices and widths walk blocks of 128 rows, sm_80 none: its tensor core takes both operands and the sums from
  registers, and 128 tokens spill.
* expand, dense, many tokens: the weight is written out in 16 bits and cuBLAS multiplies. Reading 4 bits and writing 16
  of each weight takes 11 % of the time of the product at 2048 tokens and 6 % at 4096.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sarqc_kernels.device import Device
from sarqc_kernels.errors import BackendError
from sarqc_kernels.tuned import bucket, choices
from sarqc_kernels.w4a16.layout import PAD_N, TILE_K, TILE_N
from sarqc_kernels.w4a16.plan import Plan
from sarqc_kernels.w4a16.predict import programs_of, seconds_of

__all__ = [
    "EXPAND",
    "WIDTHS_GROUPS",
    "Plan",
    "candidates",
    "choose",
    "configurations",
    "dot",
    "dot_sizes",
    "groups_per_tile",
    "key",
    "other_widths",
    "persistent",
    "rule",
    "splittable",
    "takes_group",
]

DOT_TOKENS = (16, 32, 64, 128)
FOLDED_TOKENS = 128  # from here on, and in all with a tail, scales go into the weights
TAILED = {48: 16, 80: 16, 96: 32, 144: 16, 160: 32, 192: 64}  # of a block's tokens those in sums of their own
FOLDED_BYTES = 118_800  # of shared memory that blocks of 128 rows take then; those of fewer tokens take up to 81 920
GROUPS = (1, 2, 4, 8)  # to a tile
WIDTHS_GROUPS = 2
EXPAND_TOKENS = 512  # least
LEAST_TILES = 4  # of a split
SLACK = 0.25
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)


def takes_group(group_size: int, inputs: int) -> bool:
    """Whether a tile holds whole groups or lies within one: 16, 32, 64, multiples of 128, or one group a row."""
    return group_size == inputs or group_size % TILE_K == 0 or group_size in (16, 32, 64)


def groups_per_tile(group_size: int, inputs: int) -> int:
    """Scales that a row of a tile meets."""
    return 1 if group_size == inputs else max(1, TILE_K // group_size)


def choose(
    tokens: int, outputs: int, inputs: int, group_size: int, experts: int, device: Device, bits: int = 4
) -> Plan:
    """The plan for x [tokens, inputs] times a weight [experts, outputs, inputs] of `bits`; experts = 0: dense."""
    shape = (tokens, outputs, inputs, group_size, experts)
    table = choices("w4a16", device.arch) if bits == 4 else {}
    if table and (measured := table.get(key(*shape))):
        known = candidates(*shape, device)
        if measured["plan"] not in known:
            raise BackendError(f"the w4a16 table of sm_{device.arch} names {measured['plan']!r}: run benchmarks.tune")
        return known[measured["plan"]]
    return rule(*shape, device, bits)


@functools.lru_cache(maxsize=8192)  # predicting some dozen plans takes longer than a launch
def rule(tokens: int, outputs: int, inputs: int, group_size: int, experts: int, device: Device, bits: int = 4) -> Plan:
    """The plan of a call that no table has: of least predicted time, the fewest splits first.

    A prediction is worth `SLACK`: within that a plan is preferred that leaves no third of the processors idle.
    """
    shape = (max(1, tokens), outputs, inputs, experts)
    groups = groups_per_tile(group_size, inputs)
    timed = [(seconds_of(plan, shape, device, bits), plan) for plan in _plans(shape, groups, device, bits)]
    least = min(seconds for seconds, _ in timed)
    near = [(seconds, plan) for seconds, plan in timed if seconds <= least * (1 + SLACK)]
    filling = [each for each in near if programs_of(each[1], shape) * 3 >= 2 * device.multiprocessors]
    return min(filling or near, key=lambda each: each[0])[1]


def _plans(shape: tuple[int, int, int, int], groups: int, device: Device, bits: int) -> Iterator[Plan]:
    """Plans that could be the fastest, fewest splits first: none that cuts tokens into dozens of blocks where larger
    ones are at hand, or inputs where blocks are four on each processor."""
    tokens, _, inputs, experts = shape
    share = -(-tokens // max(1, min(experts, tokens)))
    sizes = [size for size in dot_sizes(groups, device, bits) if size >= 64 or size * 8 >= share]
    for splits in SPLITS:
        plans = [dot(size, splits, device, bits) for size in sizes]
        if splits > 1:
            fewer = [programs_of(dot(plan.tokens, 1, device, bits), shape) for plan in plans]
            few = [plan for plan, count in zip(plans, fewer) if count <= 4 * device.multiprocessors]
            plans = [plan for plan in few if splittable(plan.tokens, device, bits)]
        if splits == 1 or splits * LEAST_TILES <= -(-inputs // TILE_K):
            yield from plans
    if FOLDED_TOKENS in sizes:
        yield persistent(device, bits)
    if not experts and tokens >= EXPAND_TOKENS:
        yield EXPAND


def key(tokens: int, outputs: int, inputs: int, group_size: int, experts: int) -> str:
    """Of a call in the table: tokens by powers of two, the weight as it is (a model has few)."""
    groups = groups_per_tile(group_size, inputs)
    return f"e{experts} m{bucket(tokens)} n{outputs} k{inputs} g{groups}"


@functools.lru_cache(maxsize=1024)  # a call that a table has would make them anew each time
def candidates(
    tokens: int, outputs: int, inputs: int, group_size: int, experts: int, device: Device
) -> Mapping[str, Plan]:
    """Every plan that could run a call and is checked ahead of time, by name: what a table may choose from."""
    groups, most = groups_per_tile(group_size, inputs), max(1, -(-inputs // TILE_K) // LEAST_TILES)
    sizes = dot_sizes(groups, device)
    plans = [dot(size, splits, device) for splits in (1, 2, 4, 8, 16) if splits <= most for size in sizes]
    plans += [] if experts else [EXPAND]
    plans += [persistent(device)] if FOLDED_TOKENS in sizes else []
    return {plan.name: plan for plan in plans}


EXPAND = Plan("expand", 0, 64, 1, 4, 1)


@functools.cache
def dot(tokens: int, splits: int, device: Device, bits: int = 4) -> Plan:
    """The dot plan for a block of `tokens` tokens, one of `dot_sizes`.

    Where sums live in registers: from 64 tokens on two groups of four warps share the rows of a block. On sm_100
    they live in tensor memory, of which each dot of a tile gets a part: with 64 tokens and a group of 16 inputs a dot,
    512 columns hold eight parts of 64 rows. Warps of widths other than 4, whose planes take registers, are those that
    do not spill.
    """
    many = 8 if tokens >= 48 else 4
    if not device.tensor_memory:
        many = 8 if bits != 4 and device.sums_in_registers and tokens >= 32 else many
    elif tokens >= 64:
        many = 8 if (bits == 4) == (tokens >= FOLDED_TOKENS) else 4
    rows = TILE_N if device.tensor_memory and tokens == 64 else PAD_N
    tail, stages = TAILED.get(tokens, 0), 3 if tokens >= 64 else 4
    folded = tail > 0 or tokens >= FOLDED_TOKENS
    registers = _registers(tokens, device.arch, bits)
    return Plan("dot", tokens - tail, rows, splits, many, stages, folded=folded, tail=tail, registers=registers)


def _registers(tokens: int, arch: int, bits: int) -> int:
    """Registers that a thread of a dot plan may have; 0: what ptxas takes by itself. On sm_90, fewer, so that two
    programs fit; elsewhere more, as many as cost no program, where ptxas stops early and spills a value or two."""
    if arch == 90 and bits == 4 and 64 <= tokens < FOLDED_TOKENS:
        return 128
    if arch == 80 and bits == 4 and tokens == 16:
        return 128
    return 168 if (arch, bits, tokens) in ((100, 4, FOLDED_TOKENS), (120, 3, 32)) else 0


@functools.cache
def persistent(device: Device, bits: int = 4) -> Plan:
    """The plan of which each processor has one program, for a device whose `dot_sizes` reach `FOLDED_TOKENS`."""
    tall = device.arch == 90 and bits == 4  # more planes, and 256 rows spill
    return replace(dot(FOLDED_TOKENS, 1, device, bits), block_n=2 * PAD_N if tall else PAD_N, resident=1)


def dot_sizes(groups: int, device: Device, bits: int = 4) -> tuple[int, ...]:
    """Tokens of the dot blocks that fit and do not spill with `groups` groups to a tile (seen ahead of time)."""
    spills = device.sums_in_registers or (device.tensor_memory and bits == 7)  # 7 bits are three planes
    most = 64 if spills or device.shared_bytes < FOLDED_BYTES else FOLDED_TOKENS
    # 16 with splits: ptxas stops at 80 registers and spills one
    least = 32 if groups == 8 and device.tensor_memory else 16
    sizes = tuple(size for size in DOT_TOKENS if least <= size <= most)
    return tuple(sorted((*sizes, *TAILED))) if device.arch == 90 and bits == 4 and most == FOLDED_TOKENS else sizes


def splittable(tokens: int, device: Device, bits: int) -> bool:
    """Whether inputs can be split: on sm_100 partial sums of 128 tokens spill where codes are not of 4 bits."""
    return not (device.tensor_memory and bits != 4 and tokens >= FOLDED_TOKENS)


def configurations(device: Device) -> list[tuple[Plan, int]]:
    """(plan, groups to a tile): every block that `choose` can return for 4 bits; splits of 2 stand for more."""
    return [(plan, groups) for groups in GROUPS for plan in _checked(device, 4, groups)]


def other_widths(device: Device) -> list[tuple[int, Plan]]:
    """(bits, plan): the same for widths other than 4, with `WIDTHS_GROUPS` groups to a tile for all.

    5, 6 and 7 bits are two or three of the planes of the others: the block with the most registers stands for all.
    """
    every = [(bits, plan) for bits in (2, 3, 8) for plan in _checked(device, bits, WIDTHS_GROUPS)]
    return every + [(bits, _checked(device, bits, WIDTHS_GROUPS)[-1]) for bits in (5, 6, 7)]


def _checked(device: Device, bits: int, groups: int) -> list[Plan]:
    """What `rule` and `candidates` take plans from, each block with splits and without."""
    sizes = dot_sizes(groups, device, bits)
    split = [dot(size, 2, device, bits) for size in sizes if splittable(size, device, bits)]
    plans = [EXPAND, *split, *(dot(size, 1, device, bits) for size in sizes)]
    return [*plans, persistent(device, bits)] if FOLDED_TOKENS in sizes else plans
