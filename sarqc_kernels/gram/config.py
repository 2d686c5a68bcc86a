"""Which tiles the Gram kernel uses: a pure function of shape, dtype, card and a committed table (`tuned.py`), where
there is one. Nothing is tried out at run time; without an entry in the table the rules below decide.

A tile of the Gram is M x N inputs; the rows of x pass through it DEPTH at a time. Per element of x that a tile reads,
N (or M) products are made, so wide tiles ask less of the L2 cache: 128 x 128 needs a byte for 64 flops, 128 x 256 a
byte for 85. The wide one has half as many tiles, which leave more of the last wave idle.

Where the tiles do not fill the GPU evenly, the rows are cut into `splits` stretches (split-K) with partial sums of
their own, added up in order by a second kernel: that costs their memory written and read once, and is deterministic.
Tile and splits are those of the least `predicted` time, from rates of the tensor cores and of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sarqc_kernels.aot import ARCHS
from sarqc_kernels.device import Device
from sarqc_kernels.errors import BackendError
from sarqc_kernels.tuned import bucket, choices

__all__ = ["FLUSH", "Plan", "Tile", "choose", "configurations", "key", "plan_of", "predicted", "rule", "tiles"]

FLUSH = 4096
"""Most rows summed in registers before the sum goes to memory: bounds what truncating adders of a tensor core lose."""

ROOMY = (80, 87, 90, 100, 103)  # cards on which a program can have 160 KiB of shared memory; others have 99
MOST_SPLITS = 16
LEAST_ROWS = 512  # in a split; below, starting up and partial sums cost more than they gain
MOST_WORKSPACE = 1 << 29  # bytes of partial sums
FLOPS = 3270  # of 16-bit products in a cycle of a multiprocessor: 790 TFLOP/s of an H200
L2_BYTES = 24  # that reach a multiprocessor from the L2 cache in a cycle: 5.8 TB/s of an H200 (not measured by us)
LAUNCH_CYCLES = 5000  # of a second kernel


@dataclass(frozen=True)
class Tile:
    """What is compiled.

    m x n: inputs. depth: rows at a time. descriptors: x is read by bulk copies (sm_90 on). apart: tiles on the
    diagonal, which sum |x| too, have a loop of their own; in one for all, every tile takes x into registers each step.
    """

    m: int
    n: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    apart: bool = False

    def units(self, inputs: int) -> int:
        """Tiles that touch the lower triangle of a Gram of `inputs`: row i of tiles has i // (n / m) + 1 of them."""
        ratio = self.n // self.m
        groups, rest = divmod(-(-inputs // self.m), ratio)
        return ratio * groups * (groups + 1) // 2 + rest * (groups + 1)


@dataclass(frozen=True)
class Plan:
    """How one call runs. splits: stretches that the rows are cut into. programs: of the launch."""

    tile: Tile
    splits: int
    programs: int


def choose(experts: int, tokens: int, inputs: int, dtype: torch.dtype, card: Device, even: bool) -> Plan:
    """The plan of a call. even: inputs, row stride and address of x are multiples of 16, so that copies can be wide."""
    if measured := choices("gram", card.arch).get(key(experts, tokens, inputs, dtype, even)):
        known = tiles(card.arch, dtype, even)
        if measured["tile"] not in known:
            raise BackendError(f"the gram table of sm_{card.arch} names tile {measured['tile']!r}: run benchmarks.tune")
        return plan_of(known[measured["tile"]], experts, tokens, inputs, card, measured["splits"])
    return rule(experts, tokens, inputs, dtype, card, even)


def rule(experts: int, tokens: int, inputs: int, dtype: torch.dtype, card: Device, even: bool) -> Plan:
    """The plan of a call that no table has: of the least predicted time, the smaller tile where two are equal."""
    plans = [plan_of(tile, experts, tokens, inputs, card) for tile in _tiles(dtype, card.arch, even)]
    return min(plans, key=lambda plan: predicted(plan.tile, plan.splits, experts, tokens, inputs, card))


def predicted(tile: Tile, splits: int, experts: int, tokens: int, inputs: int, card: Device) -> float:
    """Cycles that a call takes where experts have equal rows: those of the fullest multiprocessor, and of the sum.

    A row costs a tile what its products take, or what its m + n elements of two bytes take from the L2 cache. Each
    FLUSH rows a tile of the Gram is read and written; a split writes its own, and the second kernel reads all of them.
    """
    units, rows = experts * tile.units(inputs), tokens / max(1, experts)
    row = max(2 * tile.m * tile.n / FLOPS, 2 * (tile.m + tile.n) / L2_BYTES)
    flush = 8 * tile.m * tile.n / L2_BYTES
    stretch = rows / splits
    waves = -(-units * splits // card.multiprocessors)
    total = waves * (stretch * row + -(-stretch // FLUSH) * flush)
    if splits > 1:
        total += LAUNCH_CYCLES + 4 * (splits + 2) * units * tile.m * tile.n / (L2_BYTES * card.multiprocessors)
    return total


def plan_of(tile: Tile, experts: int, tokens: int, inputs: int, card: Device, splits: int | None = None) -> Plan:
    """The plan with a given tile. splits: no more than these (by the rule for None), and no more than pay at all."""
    units, rows, tile_bytes = experts * tile.units(inputs), tokens // max(1, experts), 4 * tile.m * tile.n
    most = _most_splits(units, rows, tile_bytes)
    if splits is None:
        splits = min(range(1, most + 1), key=lambda count: predicted(tile, count, experts, tokens, inputs, card))
    else:
        splits = min(splits, most)
    items = units * splits
    # Experts get very different numbers of rows: a program for each tile lets the hardware balance them. The equal
    # tiles of a single Gram stay with one program on each multiprocessor.
    return Plan(tile, splits, items if experts > 1 else min(items, card.multiprocessors))


def key(experts: int, tokens: int, inputs: int, dtype: torch.dtype, even: bool) -> str:
    """Of a call in the table; sizes by powers of two."""
    kind, access = str(dtype).removeprefix("torch."), "even" if even else "odd"
    return f"{kind} {access} e{bucket(experts)} t{bucket(tokens)} k{bucket(inputs)}"


def tiles(arch: int, dtype: torch.dtype, even: bool) -> dict[str, Tile]:
    """Tiles that are checked ahead of time for such calls, by name: what a table may choose from."""
    matching = [tile for *known, tile in configurations() if known == [arch, dtype, even]]
    return {f"{tile.m}x{tile.n}x{tile.depth}": tile for tile in matching}


def configurations() -> Iterator[tuple[int, torch.dtype, bool, Tile]]:
    """Every (arch, dtype, even, tile) that `choose` can return for the cards that are checked ahead of time."""
    for arch in ARCHS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for even in (True, False):
                yield from ((arch, dtype, even, tile) for tile in _tiles(dtype, arch, even))


def _tiles(dtype: torch.dtype, arch: int, even: bool) -> list[Tile]:
    """The tiles to choose from."""
    crowded = Device(arch, 1).sums_in_registers
    if not even:  # element by element, whatever the card: small, so that the addresses fit into registers
        return [Tile(64, 64, 16, warps=8 if dtype == torch.float32 and crowded else 4, stages=2)]
    roomy = arch in ROOMY  # shared memory of a server's card
    if dtype == torch.float32:
        if crowded:
            return [Tile(64, 64, 32, warps=4, stages=3)]
        return [Tile(128, 128, 32, warps=8, stages=3, descriptors=True)]
    if arch < 90:
        return [Tile(128, 128, 64 if roomy else 32, warps=8, stages=4)]
    # Two loops on sm_90 alone, and not for fp32: that spills, and on later cards they take too much shared memory.
    return [
        Tile(128, n, 64 if roomy else 32, warps=8, stages=4, descriptors=True, apart=arch == 90)
        for n in ((128, 256) if roomy else (128,))
    ]


def _most_splits(units: int, rows: int, tile_bytes: int) -> int:
    return max(1, min(MOST_SPLITS, rows // LEAST_ROWS, MOST_WORKSPACE // max(1, units * tile_bytes)))
