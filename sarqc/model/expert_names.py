"""Names for single experts where a checkpoint stores the matrices of all experts in one tensor.

A quantized matrix is written alone, so it needs a name. transformers has one where it can also read experts one by one;
that is then the name. Otherwise it is the one that servers read quantized experts of that kind by: `experts`,
the expert's number and `gate_proj`, `up_proj` and `down_proj`, or `w1`, `w3` and `w2` where the tensors of all experts
have other names than `gate_up_proj` and `down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from sarqc.conventions import ExpertSlice
from sarqc.model import moe

_PLAIN = (("gate_proj", "up_proj"), ("up_proj",), ("down_proj",))
_NUMBERED = (("w1", "w3"), ("w1",), ("w2",))


def stored_names(model: Any, parameter: str) -> Mapping[str, Tensor]:
    """The tensors, on meta, that transformers would save a parameter as."""
    found: Mapping[str, Tensor] = revert_weight_conversion(
        model, {parameter: model.get_parameter(parameter).to("meta")}
    )
    return found


def single_experts(model: Any, parameter: str, fused: str) -> dict[str, ExpertSlice]:
    """Each matrix in the tensor `fused`, which is the whole parameter of an experts module, by a name of its own.

    In the order of the parameter: experts ascending, gate before up.
    """
    path, _, projection = parameter.rpartition(".")
    module = model.get_submodule(path)
    weight: Tensor = getattr(module, projection)
    gated = module.has_gate and projection == moe.projections(module)[0]
    experts, outputs, inputs = weight.mT.shape if module.is_transposed else weight.shape
    leaves = _leaves(fused, gated, projection)
    rows = outputs // len(leaves)
    interleaved = gated and not getattr(module, "is_concatenated", True)
    found = {}
    for expert in range(experts):
        for part, leaf in enumerate(leaves):
            start, step = (part, len(leaves)) if interleaved else (part * rows, 1)
            name = f"{_parent(fused)}.{expert}.{leaf}.weight"
            found[name] = ExpertSlice(fused, expert, start, step, (rows, inputs), module.is_transposed)
    return found


def _parent(fused: str) -> str:
    parent = fused.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith("experts") else f"{parent}.experts"


def _leaves(fused: str, gated: bool, projection: str) -> tuple[str, ...]:
    plain = fused.removesuffix(".weight").rpartition(".")[2] in ("gate_up_proj", "up_proj", "down_proj")
    style = _PLAIN if plain else _NUMBERED
    return style[2] if projection == "down_proj" else style[0] if gated else style[1]
