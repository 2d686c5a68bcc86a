"""What nvdisasm prints: instructions, and which of them are loops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Instruction", "loops"]

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers, as in HGMMA.64x128x16.F32.BF16. operands: as they are written."""

    opcode: str
    operands: str

    @property
    def stem(self) -> str:
        """The opcode alone: HGMMA."""
        return self.opcode.partition(".")[0]


def loops(lines: Iterable[str]) -> tuple[list[Instruction], list[range]]:
    """The instructions of a disassembled kernel, and its loops, as places among them: each from where a branch goes
    back to, to that branch. An outer loop holds its inner ones."""
    labels: dict[str, int] = {}
    items: list[Instruction] = []
    found: list[range] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(items)
        elif match := _INSTRUCTION.search(line):
            items.append(Instruction(match[1], match[2]))
            target = _TARGET.search(match[2])
            if items[-1].stem == "BRA" and target and target[1] in labels:
                found.append(range(labels[target[1]], len(items)))
    return items, [loop for loop in found if len(loop) > 1]
