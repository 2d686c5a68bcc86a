"""Which kernel, which tile, how many splits: pure functions of the shape, the card and a committed table (`tuned.py`)
where there is one. Nothing is tuned at run time.

The rules, for shapes that no table has, follow from counting, none from a timing; no GPU has run them yet.

* gemv, one or two tokens: no tensor core, one fp32 multiply-add for each weight and token beside three instructions
  that unpack it. At 4 tokens those seven instructions a weight would take longer than reading it.
* dot: weights are the first operand of the tensor core, 128 rows a tile, so a tile pads tokens to 16, not to 64.
  With 16 tokens a stage holds 8 KiB of words and 4 KiB of activations: four stages and two programs on a processor
  keep about 70 KiB in flight there, more than bandwidth times latency asks for (4.3 TB/s x 0.8 us / 132 = 26 KiB).
* splits: where tiles of rows are fewer than processors, inputs are cut so that programs reach about the number of
  processors, with at least four k_tiles (512 inputs) each; partial sums are fp32, added in order by a second kernel.
* folded, in tiles of 128 tokens, which more than 64 take: scales go into the weights (rounded once to 16 bits, as
  `expand` does), so that one sum runs through all k_tiles and the tensor core multiplies one k_tile while the next is
  unpacked. Below, the sum of each group is scaled in fp32: that costs the same few instructions there, and a second set
  of sums has room.
* persistent: on sm_90 tiles of 256 rows and 128 tokens, one program on each processor, which walks the tiles, eight
  tiles of tokens with all tiles of rows at a time. Counted: a k_tile of such a tile takes 48 KiB from the L2 cache for
  8.4 Mflop, so at the full rate of the tensor cores all processors together ask it for 4.6 TB/s, where tiles of 128
  rows ask for 7.6. And 8 x 16 tiles under way at once read half of what 32 x 4 do, the order of a plain grid. Taken
  where tiles are more than processors and their waves take no longer than those of the smaller tiles, but for a
  sixteenth that the fewer bytes are worth. Other cards and widths walk tiles of 128 rows, sm_80 none: its tensor core
  takes both operands and the sums from registers, and 128 tokens spill.
* expand, dense, from 2048 tokens on: reading 4 bits and writing 16 of each weight takes 11 % of the time of the product
  at 2048 tokens and 6 % at 4096, and cuBLAS does the rest. That it is ahead of `persistent` by more than that is likely
  and not measured: `benchmarks.tune` times dot, persistent and expand against each other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sarqc_kernels.device import Device
from sarqc_kernels.errors import BackendError
from sarqc_kernels.tuned import bucket, choices
from sarqc_kernels.w4a16.layout import PAD_N, TILE_K, TILE_N

__all__ = [
    "EXPAND",
    "WIDTHS_GROUPS",
    "Plan",
    "candidates",
    "choose",
    "configurations",
    "dot",
    "dot_sizes",
    "gemv",
    "groups_per_tile",
    "key",
    "other_widths",
    "persistent",
    "rule",
    "takes_group",
]

GEMV_TOKENS = 2
GROUPED_GEMV_ROWS = 8  # of all experts together: each row reads its own expert, so there is nothing to share
GEMV_ROWS = 16  # of a tile
DOT_TOKENS = (16, 32, 64, 128)
FOLDED_TOKENS = 128  # of the tile whose scales go into the weights; not split: so many tokens make programs enough
FOLDED_BYTES = 118_800  # of shared memory that tiles of 128 rows take then; those of fewer tokens take up to 81 920
GROUPS = (1, 2, 4, 8)  # to a k_tile
IDLE = 1 / 16  # of the time may be lost at the end of the last wave for taller tiles
WIDTHS_GROUPS = 2
EXPAND_TOKENS = 2048
LEAST_TILES = 4  # of a split
MOST_SPLITS = 16


@dataclass(frozen=True)
class Plan:
    """How a product is computed.

    kernel: "gemv", "dot" or "expand". tokens, rows: of a tile. splits: stretches of inputs summed apart. warps, stages:
    of a program. folded: scales are multiplied into the weights, not into sums. resident: programs on a processor that
    together walk all tiles; 0: a program for each tile.
    """

    kernel: str
    tokens: int
    rows: int
    splits: int
    warps: int
    stages: int
    folded: bool = False
    resident: int = 0

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{'persistent' if self.resident else self.kernel} {self.tokens} splits {self.splits}"

    def fitting(self, *, gated: bool, asymmetric: bool, experts: int) -> Plan:
        """The same with tiles of 128 rows where 256 spill: gate and up in one tile, asymmetric codes by expert."""
        if self.rows <= PAD_N or not (gated or (asymmetric and experts)):
            return self
        return replace(self, rows=PAD_N)


def takes_group(group_size: int, inputs: int) -> bool:
    """Whether a k_tile holds whole groups or lies within one: 16, 32, 64, multiples of 128, or one group a row."""
    return group_size == inputs or group_size % TILE_K == 0 or group_size in (16, 32, 64)


def groups_per_tile(group_size: int, inputs: int) -> int:
    """Scales that a row of a k_tile meets."""
    return 1 if group_size == inputs else max(1, TILE_K // group_size)


def choose(tokens: int, outputs: int, inputs: int, group_size: int, experts: int, card: Device, bits: int = 4) -> Plan:
    """The plan for x [tokens, inputs] times a weight [experts, outputs, inputs] of `bits`; experts = 0: dense."""
    shape = (tokens, outputs, inputs, group_size, experts)
    table = choices("w4a16", card.arch) if bits == 4 else {}
    if table and (measured := table.get(key(*shape))):
        known = candidates(*shape, card)
        if measured["plan"] not in known:
            raise BackendError(f"the w4a16 table of sm_{card.arch} names {measured['plan']!r}: run benchmarks.tune")
        return known[measured["plan"]]
    return rule(*shape, card, bits)


def rule(tokens: int, outputs: int, inputs: int, group_size: int, experts: int, card: Device, bits: int = 4) -> Plan:
    """The plan of a call that no table has; tables are of 4 bits."""
    k_tiles = -(-inputs // TILE_K)
    if experts == 0 and tokens >= EXPAND_TOKENS:
        return EXPAND
    if tokens <= (GROUPED_GEMV_ROWS if experts else GEMV_TOKENS):
        programs = -(-outputs // GEMV_ROWS) * (tokens if experts else 1)
        return gemv(1 if experts else tokens, _splits(programs, k_tiles, 4 * card.multiprocessors))
    share = -(-tokens // max(1, experts))  # of an expert, were they all alike
    sizes = dot_sizes(groups_per_tile(group_size, inputs), card, bits)
    plan = dot(next((size for size in sizes if share <= size), sizes[-1]), 1, card, bits)
    blocks = -(-tokens // plan.tokens) + (min(experts, tokens) if experts else 0)
    programs = -(-outputs // plan.rows) * blocks
    if plan.folded:
        walking = persistent(card, bits)
        tiles = -(-outputs // walking.rows) * blocks
        time = [-(-count // card.multiprocessors) * each.rows for count, each in ((programs, plan), (tiles, walking))]
        return walking if tiles > card.multiprocessors and time[1] <= time[0] * (1 + IDLE) else plan
    return replace(plan, splits=_splits(programs, k_tiles, card.multiprocessors))


def key(tokens: int, outputs: int, inputs: int, group_size: int, experts: int) -> str:
    """Of a call in the table: tokens by powers of two, the weight as it is (a model has few)."""
    groups = groups_per_tile(group_size, inputs)
    return f"e{experts} m{bucket(tokens)} n{outputs} k{inputs} g{groups}"


@functools.lru_cache(maxsize=1024)  # a call that a table has would make them anew each time
def candidates(
    tokens: int, outputs: int, inputs: int, group_size: int, experts: int, card: Device
) -> Mapping[str, Plan]:
    """Every plan that could run a call and is checked ahead of time, by name: what a table may choose from."""
    groups, k_tiles = groups_per_tile(group_size, inputs), -(-inputs // TILE_K)
    checked = {(plan.kernel, plan.tokens, plan.splits > 1) for plan, _ in configurations(card)}
    plans = [] if experts else [EXPAND]
    for splits in (1, 2, 4, 8, MOST_SPLITS):
        if splits > max(1, k_tiles // LEAST_TILES):
            continue
        if experts or bucket(tokens) <= GEMV_TOKENS:
            plans.append(gemv(1 if experts else bucket(tokens), splits))
        plans += [dot(size, splits, card) for size in dot_sizes(groups, card)]
    plans += [persistent(card)] if FOLDED_TOKENS in dot_sizes(groups, card) else []
    plans = [plan for plan in plans if (plan.kernel, plan.tokens, plan.splits > 1) in checked]
    return {plan.name: plan for plan in plans}


EXPAND = Plan("expand", 0, 64, 1, 4, 1)


def gemv(tokens: int, splits: int) -> Plan:
    """The gemv plan for one or two tokens."""
    return Plan("gemv", tokens, GEMV_ROWS, splits, 4, 3)


def dot(tokens: int, splits: int, card: Device, bits: int = 4) -> Plan:
    """The dot plan for a tile of so many tokens.

    Up to sm_90 sums live in registers: from 64 tokens on two groups of four warps share the rows of a tile. On sm_100
    they live in tensor memory, of which each dot of a tile gets a part: with 64 tokens and a group of 16 inputs a dot,
    512 columns hold eight parts of 64 rows. Warps of widths other than 4, whose planes take registers, are those that
    do not spill.
    """
    many = 8 if tokens >= 64 else 4
    if card.arch < 100:
        many = 8 if bits != 4 and card.arch < 90 and tokens >= 32 else many
    elif tokens >= 64:
        many = 8 if (bits == 4) == (tokens >= FOLDED_TOKENS) else 4
    rows = TILE_N if card.arch >= 100 and tokens == 64 else PAD_N
    return Plan("dot", tokens, rows, splits, many, 3 if tokens >= 64 else 4, folded=tokens >= FOLDED_TOKENS)


def persistent(card: Device, bits: int = 4) -> Plan:
    """The plan of which each processor has one program, for a card whose `dot_sizes` reach `FOLDED_TOKENS`."""
    tall = card.arch == 90 and bits == 4  # more planes, and 256 rows spill
    return replace(dot(FOLDED_TOKENS, 1, card, bits), rows=2 * PAD_N if tall else PAD_N, resident=1)


def dot_sizes(groups: int, card: Device, bits: int = 4) -> tuple[int, ...]:
    """Tokens of the dot tiles that fit and do not spill with so many groups to a k_tile (seen ahead of time)."""
    spills = card.arch < 90 or (card.arch >= 100 and bits == 7)  # 7 bits are three planes
    most = 64 if spills or card.shared_bytes < FOLDED_BYTES else FOLDED_TOKENS
    least = 32 if groups == 8 and card.arch >= 100 else 16  # 16 with splits: ptxas stops at 80 registers and spills one
    return tuple(size for size in DOT_TOKENS if least <= size <= most)


def _splits(programs: int, k_tiles: int, wanted: int) -> int:
    return max(1, min(wanted // max(1, programs), k_tiles // LEAST_TILES, MOST_SPLITS))


def configurations(card: Device) -> list[tuple[Plan, int]]:
    """(plan, groups to a k_tile): every tile that `choose` can return for 4 bits; splits of 2 stand for more."""
    return [(plan, groups) for groups in GROUPS for plan in _tiles(card, 4, groups)]


def other_widths(card: Device) -> list[tuple[int, Plan]]:
    """(bits, plan): the same for widths other than 4, with `WIDTHS_GROUPS` groups to a k_tile for all.

    5, 6 and 7 bits are two or three of the planes of the others: the tile that takes the most registers stands for all.
    """
    every = [(bits, plan) for bits in (2, 3, 8) for plan in _tiles(card, bits, WIDTHS_GROUPS)]
    return every + [(bits, _tiles(card, bits, WIDTHS_GROUPS)[-1]) for bits in (5, 6, 7)]


def _tiles(card: Device, bits: int, groups: int) -> list[Plan]:
    """What `rule` and `candidates` take plans from, each tile with splits and without where it can have them."""
    gemvs = [gemv(tokens, splits) for tokens in (1, GEMV_TOKENS) for splits in (1, 2)]
    whole, split = ([dot(size, splits, card, bits) for size in dot_sizes(groups, card, bits)] for splits in (1, 2))
    tiles = [EXPAND, *gemvs, *(plan for plan in split if not plan.folded), *whole]
    return [*tiles, persistent(card, bits)] if whole[-1].folded else tiles
