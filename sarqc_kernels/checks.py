"""Argument checks that several operations share; each raises `ArgumentError` and otherwise does nothing."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sarqc_kernels.errors import ArgumentError

__all__ = [
    "check_bits",
    "check_contiguous",
    "check_cut",
    "check_grid",
    "check_offsets",
    "check_same_device",
    "check_tensor",
]


def check_bits(bits: int) -> None:
    """bits is a width that codes can have."""
    if not 2 <= bits <= 8:
        raise ArgumentError(f"bits = {bits} is out of range: use a whole number from 2 to 8")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """`tensor` has exactly this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ArgumentError(f"{name} is {tensor.dtype} {list(tensor.shape)}: pass {dtype} {list(shape)}")


def check_grid(shape: tuple[int, int, int], scales: Tensor, zeros: Tensor | None) -> None:
    """scales and zeros are a grid of a weight [E, N, K]: floating and uint8 [E, N, G] with G dividing K."""
    experts, rows, columns = shape
    fits = scales.dim() == 3 and tuple(scales.shape[:2]) == (experts, rows) and scales.is_floating_point()
    if not fits or scales.shape[2] < 1 or columns % scales.shape[2]:
        raise ArgumentError(
            f"scales is {scales.dtype} {list(scales.shape)}: pass floating [{experts}, {rows}, G], G dividing {columns}"
        )
    if zeros is not None:
        check_tensor("zeros", zeros, tuple(scales.shape), torch.uint8)


def check_offsets(offsets: Tensor | None, experts: int) -> None:
    """offsets has the form of `experts` stretches of rows; None is one stretch."""
    if offsets is not None:
        check_tensor("offsets", offsets, (experts + 1,), torch.int64)
    elif experts != 1:
        raise ArgumentError(f"offsets is None with {experts} experts: pass int64 [{experts + 1}], rows of x by expert")


def check_contiguous(name: str, **tensors: Tensor | None) -> None:
    """The tensors of `name` lie in one piece, as kernels that take pointers read them."""
    for part, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ArgumentError(
                f"{name}.{part} has strides {tensor.stride()} for {list(tensor.shape)}: repack the part that is "
                "wanted, a slice of a repacked weight cannot be read"
            )


def check_cut(offsets: Tensor | None, tokens: int) -> None:
    """What offsets holds cuts `tokens` rows into stretches. Not looked at on a device, where that would wait for it."""
    if offsets is None or offsets.device.type != "cpu":
        return
    cuts = offsets.tolist()
    if cuts[0] < 0 or cuts[-1] > tokens or any(a > b for a, b in itertools.pairwise(cuts)):
        raise ArgumentError(
            f"offsets = {cuts} do not cut {tokens} rows: pass numbers from 0 to {tokens} that never fall"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors lie on the device of the first."""
    (first, anchor), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != anchor.device:
            raise ArgumentError(f"{name} is on {tensor.device} and {first} on {anchor.device}: move them to one device")
