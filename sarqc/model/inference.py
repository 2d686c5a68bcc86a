"""A checkpoint as an ordinary transformers model: every weight dense, or the quantized ones packed as they are.

Packed layers multiply through the W4A16 kernel and never hold the dense matrix. Experts stay the module transformers
made: only its two projections become packed modules, which the experts function of experts.py calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sarqc.method.weight import QuantizedWeight
from sarqc.model import experts
from sarqc.model.names import Piece
from sarqc.model.skeleton import Skeleton
from sarqc.model.source import TensorSource
from sarqc_kernels.w4a16 import PreparedWeight, prepare, w4a16_matmul


class PackedWeight(nn.Module):
    """Matrices of E experts in the layout that the kernel of this device reads (`sarqc_kernels.w4a16.layout`).

    weight: what the codes are. dtype: of the activations to come, which the choice of a layout depends on.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, weight: QuantizedWeight, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        zeros = None if weight.sym else weight.zeros
        prepared = prepare(weight.codes, weight.scales, zeros, bits=weight.bits, dtype=dtype, device=device)
        for name in ("words", "scales", "zeros"):
            self.register_buffer(name, getattr(prepared, name), persistent=False)
        self.layout, self.bits = prepared.layout, prepared.bits
        self.out_features, self.in_features, self.group_size = prepared[-3:]

    def prepared(self) -> PreparedWeight:
        """The weight as the kernel takes it; `sarqc_kernels.w4a16.restore` makes codes of it again."""
        return PreparedWeight(
            self.words, self.scales, self.zeros,
            self.layout, self.bits, self.out_features, self.in_features, self.group_size,
        )  # fmt: skip

    def matmul(self, x: Tensor, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
        """x [T, K], sorted by expert where there are offsets [E + 1] -> [T, N]."""
        return w4a16_matmul(x, self.prepared(), offsets, bias)


class QuantLinear(PackedWeight):
    """A Linear whose weight is packed; `bias` is a parameter as before."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: nn.Parameter | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, device, dtype)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        bias = None if self.bias is None else self.bias.unsqueeze(0)
        return self.matmul(x.reshape(-1, self.in_features), None, bias).reshape(*x.shape[:-1], self.out_features)


class QuantExperts(PackedWeight):
    """One projection of an experts module, packed."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K] sorted by expert, offsets [E + 1] -> [T, N]."""
        return self.matmul(x, offsets, None)


def build(
    model: Skeleton | PreTrainedConfig,
    source: TensorSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Any:
    """A transformers model with all its weights, in eval mode, ready for `generate`.

    model: a skeleton, which the result takes over, or a configuration. dtype: of activations and dense weights, the
    checkpoint's by default. packed: quantized layers keep their codes; otherwise they are expanded to `dtype`.
    """
    skeleton = model if isinstance(model, Skeleton) else Skeleton.from_config(model, source)
    skeleton.load_outer(source, device, dtype, head=True)
    for index in range(len(skeleton.blocks)):
        if packed:
            _pack_block(skeleton, index, source, device, dtype or skeleton.dtype)
        skeleton.load_block(index, source, device, dtype)
    return skeleton.model


def _pack_block(
    skeleton: Skeleton, index: int, source: TensorSource, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Put packed modules where the source has codes; what is left dense is loaded afterwards."""
    start = f"{skeleton.prefix}.{index}"
    for path, module in list(skeleton.blocks[index].named_modules()):
        name = f"{start}.{path}"
        if isinstance(module, nn.Linear):
            weight = _codes(skeleton.pieces.get(f"{name}.weight", ()), source)
            if weight is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(skeleton.model.get_submodule(parent), leaf, QuantLinear(weight, module.bias, device, dtype))
        elif experts.is_experts(module):
            for projection in experts.projections(module):
                weight = _codes(skeleton.pieces[f"{name}.{projection}"], source)
                if weight is not None:
                    delattr(module, projection)
                    setattr(module, projection, QuantExperts(weight, device, dtype))


def _codes(pieces: Sequence[Piece], source: TensorSource) -> QuantizedWeight | None:
    """The codes of all matrices of a parameter, stacked; None where one of them is dense or they are not alike."""
    found: dict[int, list[QuantizedWeight]] = {}
    for piece in pieces:
        weight = source.quantized(piece.linear) if piece.linear else None
        if weight is None:
            return None
        found.setdefault(piece.expert or 0, []).append(weight)
    every = [weight for row in found.values() for weight in row]
    if not every or len({(weight.bits, weight.group_size, weight.scales.dtype) for weight in every}) > 1:
        return None
    stacks = [found[expert] for expert in sorted(found)]
    return QuantizedWeight(
        codes=torch.cat([torch.cat([weight.codes for weight in row], 1) for row in stacks]),
        scales=torch.cat([torch.cat([weight.scales for weight in row], 1) for row in stacks]),
        zeros=torch.cat([torch.cat([weight.zeros for weight in row], 1) for row in stacks]),
        bits=every[0].bits,
    )
