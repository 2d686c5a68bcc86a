"""How csrc/gemv.cu divides a product of few tokens: rows and inputs among warps, inputs among blocks (split-K).

A pure function of the shape and the device, by a predicted time that is counted, not measured. A block of eight warps
has `warps_n` of them side by side on 32 rows each; the others share their inputs. `splits` blocks form a cluster, which
adds its sums up in shared memory, so only devices of sm_90 and later split. Three times are compared:

* issue: 229 instructions of a warp for 32 rows of a tile (SASS, 4 bits), on the processor with the most blocks;
* bytes: the weight once from memory, as fast as what the warps have under way allows, x once for each block from the
  L2 cache;
* fill: what a block takes before its first product and after its last, for each two blocks that a processor has.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sarqc_kernels.device import Device
from sarqc_kernels.w4a16.layout import TILE_K

__all__ = ["CLUSTERS", "MOST_GROUPED_ROWS", "MOST_TOKENS", "WARPS", "WARP_ROWS", "GemvPlan", "gemv_plan"]

WARPS, WARP_ROWS = 8, 32
MOST_TOKENS = 16
"""Of a dense product; beyond, tiles of the Triton kernel share what a weight costs among more tokens."""
MOST_GROUPED_ROWS = 256
"""Of all experts together: each row may begin a tile, and programs are launched for all of them."""
CLUSTERS = (1, 2, 4, 8)
"""Blocks of a cluster that every device of sm_90 and later takes."""

INSTRUCTIONS = 229  # of a warp and a tile of 32 x 128
INSTRUCTIONS_OF_MORE = 285  # with 9 to 16 tokens
RATE = 4 * 0.7  # instructions of a processor in a cycle
CLOCK = 1.8e9
MEMORY = 32e9  # bytes a second of a processor: 4.3 TB/s among 132
CACHE = 42e9  # bytes a second of a processor from the L2 cache: 5.5 TB/s among 132
LATENCY = 0.8e-6  # of memory
FILL = 1.2e-6
SLACK = 0.3  # within which a plan is preferred that leaves no third of the processors idle
X_BYTES = 98_304  # of x in the shared memory of a block, where two blocks fit
X_ROW = (64, 16)  # words of a token in a tile, and between tokens
SUMS_BYTES = 16_400


@dataclass(frozen=True)
class GemvPlan:
    """columns: eights of tokens in a tile. warps_n, splits: see above. chunk: tiles of x in shared memory at a time.
    blocks: of rows. tiles: of tokens, at most."""

    columns: int
    warps_n: int
    splits: int
    chunk: int
    blocks: int
    tiles: int

    @property
    def programs(self) -> int:
        """Blocks of a launch, of dense products all of them with work."""
        return self.blocks * self.splits * self.tiles


@functools.lru_cache(maxsize=4096)
def gemv_plan(rows: int, outputs: int, k_tiles: int, bits: int, experts: int, gated: bool, device: Device) -> GemvPlan:
    """The plan of least predicted time for x [rows, K] and a weight [experts, N, K]; experts = 0: dense.

    outputs: of the result; gated: half the rows of the weight. k_tiles: tiles of 128 inputs.
    """
    share = rows if not experts else -(-rows // experts)  # of an expert, were they all alike
    columns = 1 if share <= 8 else 2
    tiles = rows if experts else -(-rows // (8 * columns))
    busy = min(experts, rows) if experts else tiles  # tiles with rows
    tokens = min(8 * columns, rows)
    timed: list[tuple[float, GemvPlan]] = []
    for warps_n in (1, 2, 4, 8):
        height = warps_n * (WARP_ROWS // 2 if gated else WARP_ROWS)
        blocks = -(-outputs // height)
        for splits in CLUSTERS if device.arch >= 90 else CLUSTERS[:1]:
            if splits > k_tiles:
                continue
            chunk = _chunk(tokens, -(-k_tiles // splits), WARPS // warps_n, device)
            plan = GemvPlan(columns, warps_n, splits, chunk, blocks, tiles)
            timed.append((_seconds(plan, busy, min(share, tokens), k_tiles, bits, device), plan))
    least = min(seconds for seconds, _ in timed)
    near = [each for each in timed if each[0] <= least * (1 + SLACK)]
    filling = [each for each in near if each[1].blocks * each[1].splits * busy * 3 >= 2 * device.multiprocessors]
    return min(filling or near, key=lambda each: each[0])[1]


def _chunk(tokens: int, k_tiles: int, together: int, device: Device) -> int:
    """Tiles whose x fits beside the sums where two blocks share a processor; whole turns of `together` warps."""
    words, apart = X_ROW
    room = min(X_BYTES, device.shared_bytes // 2 - SUMS_BYTES - 1024)
    most = (room // (4 * tokens) - apart) // words
    wanted = -(-k_tiles // together) * together
    return max(together, min(wanted, most // together * together))


def _seconds(plan: GemvPlan, busy: int, tokens: int, k_tiles: int, bits: int, device: Device) -> float:
    """Predicted time of the kernel; what differs between plans of one shape, not what a clock would show."""
    own = -(-k_tiles // plan.splits)  # tiles of a block
    turns = -(-own // (WARPS // plan.warps_n))  # of a warp
    programs = plan.blocks * plan.splits * busy
    most = -(-programs // device.multiprocessors)  # on one processor
    count = INSTRUCTIONS if plan.columns == 1 else INSTRUCTIONS_OF_MORE
    issue = most * WARPS * turns * count / RATE / CLOCK
    tile_bytes = 16 * bits * plan.warps_n * WARP_ROWS
    under_way = min(2, most) * WARPS * 16 * bits * WARP_ROWS  # of a processor's warps, a tile each
    rate = min(MEMORY * 1.5, under_way / LATENCY) * min(programs, device.multiprocessors)
    memory = programs * own * tile_bytes / min(rate, MEMORY * device.multiprocessors)
    words = programs * own * tile_bytes + programs * own * tokens * 2 * TILE_K
    cache = words / CACHE / device.multiprocessors
    return max(issue, memory, cache) + FILL * -(-most // 2) + (0.3e-6 if plan.splits > 1 else 0.0)
