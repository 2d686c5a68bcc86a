"""Modules whose weights stay packed: they multiply through `sarqc_kernels.w4a16` and never hold the dense matrix.

A packed module is filled once, with codes, and lays them out for the device that will multiply (`layout.py` there).
It may be moved and cast like any module: the codes are laid out again for where they went, and scales keep the values
and the dtype they had in the checkpoint, so no number of moves changes a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.packing import words_per_row
from sarqc_kernels.w4a16 import RepackedWeight, repack, unpack_weight, w4a16_matmul
from sarqc_kernels.w4a16.layout import STREAM

__all__ = ["DenseView", "PackedWeight", "QuantExperts", "QuantLinear", "is_packed"]


class PackedWeight(nn.Module):
    """Matrices of E experts in the layout that the kernel of this device reads (`sarqc_kernels.w4a16.layout`).

    weight: what the codes are; on meta it only reserves the room that `fill` takes later. dtype: of the activations to
    come, which the choice of a layout depends on. Its tensors are buffers that no state dict holds: what is saved is a
    checkpoint's form, which `codes` gives back.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    activations: Tensor
    """Empty: it is moved and cast with the module, and so says what activations will come."""

    def __init__(
        self, weight: QuantizedWeight, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        for name in ("words", "scales", "zeros", "activations"):
            self.register_buffer(name, None, persistent=False)
        self.fill(weight, device, dtype)

    def fill(self, weight: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> None:
        """Hold `weight`, laid out for `device` and activations of `dtype`."""
        if weight.codes.is_meta:
            prepared = _reserved(weight)
        else:
            zeros = None if weight.sym else weight.zeros
            prepared = repack(weight.codes, weight.scales, zeros, bits=weight.bits, dtype=dtype, device=device)
        self.words, self.scales, self.zeros = prepared[:3]
        self.activations = torch.empty(0, dtype=dtype, device=prepared.words.device)
        self.layout, self.bits = prepared.layout, prepared.bits
        self.out_features, self.in_features, self.group_size = prepared[-3:]

    def prepared(self) -> RepackedWeight:
        """The weight as the kernel takes it."""
        buffers = self._buffers  # an attribute of a module that is a buffer costs a microsecond
        words, scales, zeros = buffers["words"], buffers["scales"], buffers["zeros"]
        assert words is not None and scales is not None
        return RepackedWeight(
            words, scales, zeros,
            self.layout, self.bits, self.out_features, self.in_features, self.group_size,
        )  # fmt: skip

    def codes(self) -> QuantizedWeight:
        """The very codes, scales and zeros that it was filled with, where the module lies."""
        codes, scales, zeros = unpack_weight(self.prepared())
        if zeros is None:
            zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=scales.device)
        return QuantizedWeight(codes, scales, zeros, self.bits)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        stack = f"{self.words.shape[0]} x " if self.words.shape[0] > 1 else ""
        return (
            f"{stack}{self.in_features} -> {self.out_features}, {self.bits} bits, "
            f"groups of {self.group_size}, {self.layout}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to`, `.cuda` and `.float` come down to."""
        move: Callable[[Callable[[Tensor], Tensor], bool], Any] = super()._apply
        wanted, grid = fn(self.activations), fn(self.scales.new_empty(0))
        moved = wanted.device != self.words.device
        cast = wanted.dtype != self.activations.dtype or grid.dtype != self.scales.dtype
        if not (moved or cast) or wanted.is_meta or self.words.is_meta:
            return move(fn, recurse)
        weight = self.codes()
        for name in ("words", "scales", "zeros"):
            self._buffers[name] = None  # so that nothing is moved or cast that is laid out anew
        move(fn, recurse)
        self.fill(weight, wanted.device, wanted.dtype)
        return self


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

    @property
    def weight(self) -> DenseView:
        """What `nn.Linear.weight` would be, [N, K] in the dtype of the activations; see `DenseView`."""
        return DenseView(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        bias = None if self.bias is None else self.bias.unsqueeze(0)
        y = w4a16_matmul(x.reshape(-1, self.in_features), self.prepared(), None, bias)
        return y.reshape(*x.shape[:-1], self.out_features)


class DenseView(Tensor):
    """The dense weight [N, K] of a packed module, for model code that reads `module.weight`.

    Its shape, dtype and device cost nothing. An operation on it dequantizes the whole weight for that operation alone,
    so such code is right and slow. It cannot be written to.
    """

    @staticmethod
    def __new__(cls, owner: PackedWeight) -> DenseView:
        """An empty shell: only the shape, the dtype and the device of the weight are stored."""
        like = owner.activations
        made: DenseView = Tensor._make_wrapper_subclass(
            cls, (owner.out_features, owner.in_features), dtype=like.dtype, device=like.device
        )
        return made

    def __init__(self, owner: PackedWeight) -> None:
        super().__init__()
        self.owner = owner
        self._is_hf_initialized = True  # transformers fills what lacks this mark with random numbers

    def dense(self) -> Tensor:
        """The weight as an ordinary tensor."""
        return self.owner.codes().dequantize(self.dtype)[0]

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument for its own use
        """The shell: printing a weight of a large layer dequantizes nothing."""
        return f"DenseView({self.owner.extra_repr()})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's has no annotations
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the dense weight.

        Raises:
            ModelError: the operation writes to it.
        """
        written = (value for value, argument in zip(args, func._schema.arguments) if argument.is_write)
        if any(isinstance(value, cls) for value in written):
            raise ModelError("a packed weight cannot be written to: load the model with packed=False to change weights")
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class QuantExperts(PackedWeight):
    """One projection of an experts module, packed."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K] sorted by expert, offsets [E + 1] -> [T, N]."""
        return w4a16_matmul(x, self.prepared(), offsets, None)


def is_packed(model: nn.Module) -> bool:
    """Whether any weight of a model is packed."""
    return any(isinstance(module, PackedWeight) for module in model.modules())


def _reserved(weight: QuantizedWeight) -> RepackedWeight:
    """A weight on meta as it will lie, near enough to count its bytes."""
    experts, rows, columns = weight.codes.shape
    words = torch.empty(experts, rows, words_per_row(columns, weight.bits), dtype=torch.int32, device="meta")
    return RepackedWeight(words, weight.scales, weight.zeros, STREAM, weight.bits, rows, columns, weight.group_size)
