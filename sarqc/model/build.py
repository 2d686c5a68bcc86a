"""A checkpoint as an ordinary transformers model: every weight dense, or the quantized ones packed as they are.

Experts stay the module transformers made: only its two projections become packed modules, which the experts function of
moe.py calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sarqc.method.weight import QuantizedWeight
from sarqc.model import moe
from sarqc.model.lazy_model import LazyModel
from sarqc.model.packed_linear import PackedWeight, QuantExperts, QuantLinear
from sarqc.model.source import TensorSource
from sarqc.model.weight_map import TensorSlice


def build(
    lazy: LazyModel,
    source: TensorSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Any:
    """A transformers model with all its weights, in eval mode, ready for `generate`.

    lazy: the model on meta, which the result takes over. dtype: of activations and dense weights, the checkpoint's by
    default. packed: quantized layers keep their codes; otherwise they are expanded to `dtype`.
    """

    def pack(slots: Iterable[ModuleSlot]) -> None:  # and what is left dense is loaded afterwards
        for slot in slots if packed else ():
            weight = gather(slot.slices, source.quantized)
            if weight is not None:
                slot.put(weight, device, dtype or lazy.dtype)

    pack(slot for slot in module_slots(lazy.model, lazy.slices) if not slot.path.startswith(f"{lazy.prefix}."))
    lazy.load_outer(source, device, dtype, head=True)
    for index in range(len(lazy.blocks)):
        pack(module_slots(lazy.blocks[index], lazy.slices, f"{lazy.prefix}.{index}"))
        lazy.load_block(index, source, device, dtype)
    return lazy.model


@dataclass(frozen=True)
class ModuleSlot:
    """A parameter that may be packed: `leaf` of module `owner`, which is a Linear's parent or an experts module.

    path: full name of the packed module that would take it. slices: the checkpoint tensors it is made of.
    """

    owner: nn.Module
    leaf: str
    path: str
    slices: tuple[TensorSlice, ...]

    def put(self, weight: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> PackedWeight:
        """Replace what is there by a packed module."""
        there = getattr(self.owner, self.leaf)
        module: PackedWeight
        if isinstance(there, nn.Linear):
            module = QuantLinear(weight, there.bias, device, dtype)
        else:
            module = QuantExperts(weight, device, dtype)
        if self.leaf in self.owner._modules:
            self.owner._modules[self.leaf] = module  # in its slot: a Sequential runs its modules in their order
        else:
            delattr(self.owner, self.leaf)
            setattr(self.owner, self.leaf, module)
        return module


def module_slots(
    root: nn.Module, slices: Mapping[str, tuple[TensorSlice, ...]], prefix: str = ""
) -> Iterator[ModuleSlot]:
    """Every parameter below `root` that could be packed; `prefix` is root's full name, under which `slices` has it."""
    modules = dict(root.named_modules(prefix=prefix))
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            yield ModuleSlot(modules[parent], leaf, path, slices.get(f"{path}.weight", ()))
        elif moe.is_experts(module):
            for projection in moe.projections(module):
                name = f"{path}.{projection}"
                yield ModuleSlot(module, projection, name, slices[name])


def gather(slices: Sequence[TensorSlice], quantized: Callable[[str], QuantizedWeight | None]) -> QuantizedWeight | None:
    """The codes of all matrices of a parameter, stacked; None where one of them is dense or they are not alike.

    quantized: the codes of a linear layer by the checkpoint's name, E = 1, or None.
    """
    members: dict[int, list[QuantizedWeight]] = {}
    for stored in slices:
        weight = quantized(stored.linear) if stored.linear else None
        if weight is None:
            return None
        members.setdefault(stored.expert or 0, []).append(weight)
    every = [weight for row in members.values() for weight in row]
    if not every or len({(weight.bits, weight.group_size, weight.scales.dtype) for weight in every}) > 1:
        return None
    stacks = [members[expert] for expert in sorted(members)]
    return QuantizedWeight(
        codes=torch.cat([torch.cat([weight.codes for weight in row], 1) for row in stacks]),
        scales=torch.cat([torch.cat([weight.scales for weight in row], 1) for row in stacks]),
        zeros=torch.cat([torch.cat([weight.zeros for weight in row], 1) for row in stacks]),
        bits=every[0].bits,
    )
