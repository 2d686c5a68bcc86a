"""Names of mixtures of experts in mlx-lm, which keeps the matrices of all experts of a layer in one tensor.

    X.experts.E.LEAF.PART  <->  X.switch_mlp.LEAF.PART   [experts, ...]

mlx-lm calls the leaves gate_proj, up_proj and down_proj whatever the model calls them. A checkpoint whose own names are
w1, w3 and w2 says so in its config (`OWN_NAMES`), so that they come back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

OWN_NAMES = "expert_names"
"""Key of the config with the model's own names of gate, up and down, where they are other ones."""
_LEAVES = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = ("w1", "w3", "w2")
_ONE = re.compile(r"(?P<parent>.+)\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)(?P<part>(?:\.\w+)?)")
_ALL = re.compile(r"(?P<parent>.+)\.switch_mlp\.(?P<leaf>\w+)\.(?P<part>\w+)")


def stack_of(name: str) -> tuple[str, int] | None:
    """The stack that a tensor or a Linear of one expert belongs to, and its place there; None for any other name."""
    if (match := _ONE.fullmatch(name)) is None:
        return None
    leaf = dict(zip(_NUMBERED, _LEAVES)).get(match["leaf"], match["leaf"])
    return f"{match['parent']}.switch_mlp.{leaf}{match['part']}", int(match["expert"])


def experts_of(name: str, count: int, quantization: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of the `count` single experts in the stack `name`; none where it is no stack."""
    if (match := _ALL.fullmatch(name)) is None:
        return []
    leaf = dict(zip(_LEAVES, quantization.get(OWN_NAMES) or _LEAVES)).get(match["leaf"], match["leaf"])
    return [f"{match['parent']}.experts.{expert}.{leaf}.{match['part']}" for expert in range(count)]


def own_names(linears: Iterable[str]) -> list[str] | None:
    """The model's own names of gate, up and down, where they are not mlx-lm's."""
    numbered = any((match := _ONE.fullmatch(name)) and match["leaf"] in _NUMBERED for name in linears)
    return list(_NUMBERED) if numbered else None
