"""The product of activations with a packed weight, dense or grouped by expert: contract, dispatch, registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_cut, check_offsets, check_same_device
from sarqc_kernels.device import triton_unsupported
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.fast_path import takes_fast_path
from sarqc_kernels.w4a16 import config, cpu, cuda, reference
from sarqc_kernels.w4a16.layout import TILES, RepackedWeight, check_weight

__all__ = ["ACTIVATION_DTYPES", "implementations", "triton_unsupported_product", "w4a16_matmul"]

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_unsupported_product(
    x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why the Triton kernels cannot take the call; None where they can."""
    if reason := triton_unsupported(x):
        return reason
    if weight.layout != TILES:
        return f"the weight lies as {weight.layout!r}: the kernels read {TILES!r}"
    if x.dtype == torch.float32:
        return "x is torch.float32: the tensor cores take torch.bfloat16 and torch.float16"
    if not config.takes_group(weight.group_size, weight.in_features):
        return f"groups of {weight.group_size} do not fit tiles: use 16, 32, 64, multiples of 128, or one a row"
    return None


def _run_triton(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    from sarqc_kernels.w4a16.triton import launch

    return launch.w4a16_matmul(x, weight, offsets, bias)


_REFERENCE = Implementation("reference", takes_all, reference.w4a16_matmul)
_CPU = Implementation("cpu", cpu.unsupported, cpu.w4a16_matmul)
_CUDA = Implementation("cuda", cuda.unsupported, cuda.w4a16_matmul)
_TRITON = Implementation("triton", triton_unsupported_product, _run_triton)
_ON_CPU = (_CPU, _REFERENCE, _TRITON, _CUDA)
_ON_GPU = (_CUDA, _TRITON, _CPU, _REFERENCE)


def w4a16_matmul(
    x: Tensor,
    weight: RepackedWeight,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x times the transpose of a packed weight, expert by expert.

    Rounding: (code - zero) * scale in fp32, at most rounded once to x's dtype. Products are summed in fp32 at least.
    The bias is added to the sum, rounded to x's dtype or not. There are at most two roundings to x's dtype at the end,
    one without a bias. With identity activations the result is the dequantized weight exactly (one exception: see
    `cpu`). No gradient is defined.

    cuBLAS multiplies in the reference on a GPU, and in `triton` for a dense weight and thousands of tokens. Where it
    splits the inputs it may round the sum of each part to x's dtype, which is torch's default: see
    `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`, and the one for fp16.

    Args:
        x: bf16, fp16 or fp32 [T, K], rows sorted by expert.
        weight: What `repack` returned for a weight [E, N, K].
        offsets: int64 [E + 1]; expert e has rows offsets[e] .. offsets[e + 1] - 1. None: E = 1, all rows.
        bias: Floating [E, N] or None.
        backend: See `sarqc_kernels.backend`.

    Returns:
        [T, N] in x's dtype; rows outside of offsets[0] .. offsets[E] are 0.

    Raises:
        ArgumentError: Other shapes, dtypes or devices. The values of `offsets` are checked on the CPU only.
    """
    if x.dim() != 2 or x.dtype not in ACTIVATION_DTYPES or x.shape[1] != weight.in_features:
        raise ArgumentError(f"x is {x.dtype} {list(x.shape)}: pass bf16, fp16 or fp32 [tokens, {weight.in_features}]")
    check_weight("weight", weight)
    experts, outputs = weight.words.shape[0], weight.out_features
    if bias is not None and (tuple(bias.shape) != (experts, outputs) or not bias.is_floating_point()):
        raise ArgumentError(f"bias is {bias.dtype} {list(bias.shape)}: pass floating [{experts}, {outputs}] or None")
    check_offsets(offsets, experts)
    if not x.device == weight.words.device == weight.scales.device or offsets is not None or bias is not None:
        check_same_device(x=x, words=weight.words, scales=weight.scales, offsets=offsets, bias=bias)
    if takes_fast_path(x):
        return _dispatched(x, weight, offsets, bias, backend)
    out: Tensor = _OP(x, *weight, offsets, bias, backend)
    return out


def implementations(x: Tensor) -> Sequence[Implementation]:
    """What can run where `x` lies, in the order in which to try. The interpreter runs on request, never by default."""
    return _ON_CPU if x.is_cpu else _ON_GPU


def _dispatched(
    x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None, backend: str | None
) -> Tensor:
    check_cut(offsets, x.shape[0])
    args = (x, weight, offsets, bias)
    out: Tensor = pick("w4a16_matmul", implementations(x), args, backend).run(*args)
    return out


# Registered by hand: torch.library.custom_op wraps each call in Python of its own, tens of microseconds a call, which
# a decode step pays hundreds of times. Without tracing or autograd torch's dispatcher is skipped too (see `fast_path`).
_LIBRARY = torch.library.Library("sarqc", "FRAGMENT")
_LIBRARY.define(
    "w4a16_matmul(Tensor x, Tensor words, Tensor scales, Tensor? zeros, str layout, int bits, SymInt out_features, "
    "SymInt in_features, SymInt group_size, Tensor? offsets, Tensor? bias, str? backend=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _run(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    layout: str,
    bits: int,
    outputs: int,
    inputs: int,
    group_size: int,
    offsets: Tensor | None,
    bias: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    weight = RepackedWeight(words, scales, zeros, layout, bits, outputs, inputs, group_size)
    return _dispatched(x, weight, offsets, bias, backend)


def _fake(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, layout: str, bits: int, outputs: int,
          *_: object) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


_LIBRARY.impl("w4a16_matmul", _run, "CPU")
_LIBRARY.impl("w4a16_matmul", _run, "CUDA")
torch.library.register_fake("sarqc::w4a16_matmul", _fake, lib=_LIBRARY)
_OP = torch.ops.sarqc.w4a16_matmul.default
