"""Names for single experts where a checkpoint stores the matrices of all experts in one tensor.

A quantized matrix is written alone, so it needs a name. transformers has one where it can also read experts one by one;
that is then the name. Otherwise it is the one that servers read quantized experts of that kind by: `experts`,
the expert's number and `gate_proj`, `up_proj` and `down_proj`, or `w1`, `w3` and `w2` where the tensors of all experts
have other names than `gate_up_proj` and `down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from sarqc.conventions import MatrixSlice
from sarqc.model import moe

_PLAIN = (("gate_proj", "up_proj"), ("up_proj",), ("down_proj",))
_NUMBERED = (("w1", "w3"), ("w1",), ("w2",))


def stored_names(model: Any, parameter: str) -> Mapping[str, Tensor]:
    """The tensors, on meta, that transformers would save a parameter or buffer as."""
    reverted: Mapping[str, Tensor] = revert_weight_conversion(
        model, {parameter: model.get_parameter_or_buffer(parameter).to("meta")}
    )
    return reverted


@dataclass(frozen=True)
class AllExperts:
    """How the matrices of all experts are stored that make up a parameter.

    tensors: the one of all, or one for the gates and one for the rest. flipped: they lie there in the transpose of what
    the parameter is. interleaved: its rows of gates and the rest alternate there.
    """

    tensors: tuple[str, ...]
    flipped: bool = False
    interleaved: bool = False


def single_experts(model: Any, parameter: str, stored: AllExperts) -> dict[str, MatrixSlice]:
    """Each matrix of an experts module's parameter by a name of its own; nothing where `stored` has other parts.

    In the order of the parameter: experts ascending, gate before up.
    """
    path, _, projection = parameter.rpartition(".")
    module = model.get_submodule(path)
    weight: Tensor = getattr(module, projection)
    gated = module.has_gate and projection == moe.projections(module)[0]
    experts, outputs, inputs = weight.mT.shape if module.is_transposed else weight.shape
    tensors = stored.tensors
    leaves = _leaves(tensors, gated, projection)
    if len(tensors) not in (1, len(leaves)):
        return {}
    rows, apart = outputs // len(leaves), len(tensors) > 1
    interleaved = stored.interleaved or (gated and not apart and not getattr(module, "is_concatenated", True))
    single = {}
    for expert in range(experts):
        for part, leaf in enumerate(leaves):
            tensor = tensors[part if apart else 0]
            start, step = (part, len(leaves)) if interleaved else (0 if apart else part * rows, 1)
            name = f"{_parent(tensor)}.{expert}.{leaf}.weight"
            transposed = module.is_transposed != stored.flipped
            single[name] = MatrixSlice(tensor, expert, start, step, (rows, inputs), transposed, part * rows)
    return single


def _parent(fused: str) -> str:
    parent = fused.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith("experts") else f"{parent}.experts"


def _leaves(stored: Sequence[str], gated: bool, projection: str) -> tuple[str, ...]:
    ends = tuple(name.removesuffix(".weight").rpartition(".")[2] for name in stored)
    if len(ends) > 1:
        return ends
    style = _PLAIN if ends[0] in ("gate_up_proj", "up_proj", "down_proj") else _NUMBERED
    return style[2] if projection == "down_proj" else style[0] if gated else style[1]
