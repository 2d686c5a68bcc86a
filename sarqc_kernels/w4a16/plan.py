"""How a W4A16 product is computed: the block of a program, splits, registers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sarqc_kernels.w4a16.layout import PAD_N

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """How a product is computed.

    kernel: "dot" or "expand". block_m, block_n: tokens and rows of a program. splits: stretches of inputs summed apart.
    warps, stages: of a program. folded: scales are multiplied into the weights, not into sums. resident: programs on a
    processor that together walk all blocks; 0: a program for each block. tail: tokens beside `block_m`. registers: of a
    thread at most, so that two programs fit on a processor; 0: as many as the compiler takes.
    """

    kernel: str
    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    folded: bool = False
    resident: int = 0
    tail: int = 0
    registers: int = 0

    @property
    def tokens(self) -> int:
        """Of a program, tail and all."""
        return self.block_m + self.tail

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{'persistent' if self.resident else self.kernel} {self.tokens} splits {self.splits}"

    def fitting(self, *, gated: bool, asymmetric: bool, experts: int, groups: int) -> Plan:
        """The same where it would spill: 256 rows with gate and up in one, asymmetric codes by expert or eight groups
        to a tile get 128; where sums of many groups, or asymmetric codes with few tokens, need more registers, they get
        them."""
        if self.block_n > PAD_N and (gated or (asymmetric and experts) or groups > 4):
            return replace(self, block_n=PAD_N)
        more = (groups > 4 or asymmetric) if self.tokens == 16 else groups > 2
        if self.registers and not self.folded and more:
            return replace(self, registers=0)
        return self
