"""Which kernel, which tile, how many splits: pure functions of the shape, the card and a committed table (`tuned.py`)
where there is one. Nothing is tuned at run time.

The rules, for shapes that no table has, follow from counting, none from a timing; no GPU has run them yet.

* gemv, one or two tokens: no tensor core, one fp32 multiply-add for each weight and token beside three instructions
  that unpack it. At 4 tokens those seven instructions a weight would take longer than reading it.
* dot: weights are the first operand of the tensor core, 128 rows a tile, so a tile pads tokens to 16, not to 64.
  With 16 tokens a stage holds 8 KiB of words and 4 KiB of activations: four stages and two programs on a processor
  keep about 70 KiB in flight there, more than bandwidth times latency asks for (4.3 TB/s x 0.8 us / 132 = 26 KiB).
* splits: where tiles of rows are fewer than processors, inputs are cut so that programs reach about the number of
  processors, with at least four bricks (512 inputs) each; partial sums are fp32, added in order by a second kernel.
* expand, dense, from 2048 tokens on: writing and reading N K 16-bit weights once costs 1/T of the product's own
  traffic and cuBLAS does the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sarqc_kernels.cards import Card
from sarqc_kernels.errors import BackendError
from sarqc_kernels.tuned import bucket, choices
from sarqc_kernels.w4a16.layout import BRICK_COLUMNS, BRICK_ROWS, PLANES, TILE_ROWS

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
    "groups_per_brick",
    "key",
    "other_widths",
    "rule",
    "takes_group",
]

GEMV_TOKENS = 2
GROUPED_GEMV_ROWS = 8  # of all experts together: each row reads its own expert, so there is nothing to share
GEMV_ROWS = 16  # of a tile
DOT_TOKENS = (16, 32, 64, 128)
SPLIT_TOKENS = 64  # of the largest dot tile that is split: beyond, tokens make programs enough
GROUPS = (1, 2, 4, 8)  # to a brick
WIDTHS_GROUPS = 2
EXPAND_TOKENS = 2048
LEAST_BRICKS = 4  # of a split
MOST_SPLITS = 16


@dataclass(frozen=True)
class Plan:
    """How a product is computed.

    kernel: "gemv", "dot" or "expand". tokens, rows: of a tile. splits: stretches of inputs summed apart. warps, stages:
    of a program.
    """

    kernel: str
    tokens: int
    rows: int
    splits: int
    warps: int
    stages: int


def takes_group(group_size: int, inputs: int) -> bool:
    """Whether a brick holds whole groups or lies within one: 16, 32, 64, multiples of 128, or one group a row."""
    return group_size == inputs or group_size % BRICK_COLUMNS == 0 or group_size in (16, 32, 64)


def groups_per_brick(group_size: int, inputs: int) -> int:
    """Scales that a row of a brick meets."""
    return 1 if group_size == inputs else max(1, BRICK_COLUMNS // group_size)


def choose(tokens: int, outputs: int, inputs: int, group_size: int, experts: int, card: Card, bits: int = 4) -> Plan:
    """The plan for x [tokens, inputs] times a weight [experts, outputs, inputs] of `bits`; experts = 0: dense."""
    shape = (tokens, outputs, inputs, group_size, experts)
    table = choices("w4a16", card.arch) if bits == 4 else {}
    if table and (measured := table.get(key(*shape))):
        known = candidates(*shape, card)
        if measured["plan"] not in known:
            raise BackendError(f"the w4a16 table of sm_{card.arch} names {measured['plan']!r}: run benchmarks.tune")
        return known[measured["plan"]]
    return rule(*shape, card, bits)


def rule(tokens: int, outputs: int, inputs: int, group_size: int, experts: int, card: Card, bits: int = 4) -> Plan:
    """The plan of a call that no table has; tables are of 4 bits."""
    bricks = -(-inputs // BRICK_COLUMNS)
    if experts == 0 and tokens >= EXPAND_TOKENS:
        return EXPAND
    if tokens <= (GROUPED_GEMV_ROWS if experts else GEMV_TOKENS):
        programs = -(-outputs // GEMV_ROWS) * (tokens if experts else 1)
        return gemv(1 if experts else tokens, _splits(programs, bricks, 4 * card.multiprocessors))
    share = -(-tokens // max(1, experts))  # of an expert, were they all alike
    sizes = dot_sizes(groups_per_brick(group_size, inputs), card, bits)
    plan = dot(next((size for size in sizes if share <= size), sizes[-1]), 1, card, bits)
    programs = -(-outputs // plan.rows) * (-(-tokens // plan.tokens) + (min(experts, tokens) if experts else 0))
    splits = _splits(programs, bricks, card.multiprocessors) if plan.tokens <= SPLIT_TOKENS else 1
    return replace(plan, splits=splits)


def key(tokens: int, outputs: int, inputs: int, group_size: int, experts: int) -> str:
    """Of a call in the table: tokens by powers of two, the weight as it is (a model has few)."""
    groups = groups_per_brick(group_size, inputs)
    return f"e{experts} m{bucket(tokens)} n{outputs} k{inputs} g{groups}"


@functools.lru_cache(maxsize=1024)  # a call that a table has would make them anew each time
def candidates(tokens: int, outputs: int, inputs: int, group_size: int, experts: int, card: Card) -> Mapping[str, Plan]:
    """Every plan that could run a call and is checked ahead of time, by name: what a table may choose from."""
    groups, bricks = groups_per_brick(group_size, inputs), -(-inputs // BRICK_COLUMNS)
    checked = {(plan.kernel, plan.tokens, plan.splits > 1) for plan, _ in configurations(card)}
    plans = [] if experts else [EXPAND]
    for splits in (1, 2, 4, 8, MOST_SPLITS):
        if splits > max(1, bricks // LEAST_BRICKS):
            continue
        if experts or bucket(tokens) <= GEMV_TOKENS:
            plans.append(gemv(1 if experts else bucket(tokens), splits))
        plans += [dot(size, splits, card) for size in dot_sizes(groups, card)]
    plans = [plan for plan in plans if (plan.kernel, plan.tokens, plan.splits > 1) in checked]
    return {f"{plan.kernel} {plan.tokens} splits {plan.splits}": plan for plan in plans}


EXPAND = Plan("expand", 0, 64, 1, 4, 1)


def gemv(tokens: int, splits: int) -> Plan:
    """The gemv plan for one or two tokens."""
    return Plan("gemv", tokens, GEMV_ROWS, splits, 4, 3)


def dot(tokens: int, splits: int, card: Card, bits: int = 4) -> Plan:
    """The dot plan for a tile of so many tokens.

    Up to sm_90 sums live in registers: from 64 tokens on two groups of four warps share the rows of a tile. On sm_100
    they live in tensor memory, of which Triton gives each of the eight dots a part of its own: 512 columns hold eight
    times 32 tokens of 128 rows, or eight times 64 of 64 rows.
    """
    if card.arch < 100:
        shared = tokens >= (32 if bits == 3 and card.arch < 90 else 64)  # two planes take registers: 32 tokens spill
        return Plan("dot", tokens, TILE_ROWS, splits, 8 if shared else 4, 3 if tokens >= 64 else 4)
    return Plan("dot", tokens, TILE_ROWS if tokens < 64 else BRICK_ROWS, splits, 4, 4 if tokens < 64 else 3)


def dot_sizes(groups: int, card: Card, bits: int = 4) -> tuple[int, ...]:
    """Tokens of the dot tiles that do not spill with so many groups to a brick (seen ahead of time)."""
    most = 128 if groups <= 2 and card.arch < 100 and bits == 4 else 64
    least = 32 if groups == 8 and card.arch >= 100 else 16  # 16 with splits: ptxas stops at 80 registers and spills one
    return tuple(size for size in DOT_TOKENS if least <= size <= most)


def _splits(programs: int, bricks: int, wanted: int) -> int:
    return max(1, min(wanted // max(1, programs), bricks // LEAST_BRICKS, MOST_SPLITS))


def configurations(card: Card) -> list[tuple[Plan, int]]:
    """(plan, groups to a brick): every tile that `choose` can return for 4 bits; splits of 2 stand for more."""
    return [(plan, groups) for groups in GROUPS for plan in _tiles(card, 4, groups)]


def other_widths(card: Card) -> list[tuple[int, Plan]]:
    """(bits, plan): the same for widths other than 4, with `WIDTHS_GROUPS` groups to a brick for all."""
    return [(bits, plan) for bits in sorted(set(PLANES) - {4}) for plan in _tiles(card, bits, WIDTHS_GROUPS)]


def _tiles(card: Card, bits: int, groups: int) -> list[Plan]:
    """What `rule` and `candidates` take plans from, each tile with splits and without where it can have them."""
    gemvs = [gemv(tokens, splits) for tokens in (1, GEMV_TOKENS) for splits in (1, 2)]
    sizes = dot_sizes(groups, card, bits)
    whole, split = ([dot(size, splits, card, bits) for size in sizes] for splits in (1, 2))
    return [*gemvs, *whole, *(plan for plan in split if plan.tokens <= SPLIT_TOKENS), EXPAND]
