"""The PTX that kernels write inline, on numpy: what a GPU would run is run, for every thread at once.

`elementwise` is `tl.inline_asm_elementwise`: `pack` neighbouring elements are one call of the text, and operands of 16
bits share a register. Instructions are those that the package uses; another one raises NotImplementedError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Results", "elementwise", "run"]


@dataclass
class Results:
    """What Triton asks for the results of a call."""

    values: list[Any]

    def get_result(self, index: int) -> Any:
        """One of them."""
        return self.values[index]


def elementwise(text: str, inputs: Sequence[np.ndarray], kinds: Sequence[Any], pack: int) -> list[np.ndarray]:
    """Results of `kinds`, each in the shape of the inputs."""
    shape = inputs[0].shape
    given = [np.ascontiguousarray(each).reshape(-1).view(np.uint32) for each in inputs]
    registers = [each.reshape(-1, each.size * pack // np.prod(shape)) for each in given]
    counts = [pack * np.dtype(kind).itemsize // 4 for kind in kinds]
    result = run(text, [column for each in registers for column in each.T], sum(counts))
    ends = np.cumsum(counts)
    return [
        np.stack(result[end - count : end], axis=1).reshape(-1).view(kind).reshape(shape)
        for kind, count, end in zip(kinds, counts, ends)
    ]


def run(text: str, inputs: Sequence[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Registers $0 .. of the results, uint32; inputs are the registers behind them."""
    registers = {f"${outputs + number}": value for number, value in enumerate(inputs)}

    def value_of(operand: str) -> Any:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if name not in INSTRUCTIONS:
            raise NotImplementedError(f"PTX {name!r} is not emulated")
        into, *operands = re.split(r",\s*", rest)
        registers[into] = INSTRUCTIONS[name](*map(value_of, operands))
    return [registers[f"${number}"] for number in range(outputs)]


def _permute(low: Any, high: Any, selector: Any) -> Any:
    """Byte i of the result is the byte of high:low that nibble i of the selector names."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(low)
    for byte in range(4):
        place = np.uint64(8 * (int(selector) >> 4 * byte & 7))
        out |= (both >> place & np.uint64(0xFF)).astype(np.uint32) << np.uint32(8 * byte)
    return out


def _logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Bit 4 a + 2 b + c of the table, for every bit of a, b and c."""
    out = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


INSTRUCTIONS = {
    "mov.b32": lambda value: value,
    "prmt.b32": _permute,
    "lop3.b32": _logic,
    "shr.b32": lambda value, by: value >> by,
    "shl.b32": lambda value, by: value << by,
}
