"""One to four tokens in CUDA C++ (csrc/gemv.cu): a dense weight of 4 bits in k_tiles, one launch, no workspace.

Beside it stands `gemv_kernel` of `kernels`, which takes what this cannot: experts, other widths, no nvcc.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sarqc_kernels import build
from sarqc_kernels.device import device_info, interpreting, triton_unsupported
from sarqc_kernels.errors import BackendError
from sarqc_kernels.w4a16.config import groups_per_tile, takes_group
from sarqc_kernels.w4a16.layout import TILE_K, TILE_N, TILES, RepackedWeight

__all__ = ["MOST_TOKENS", "Gemv", "bind", "filled", "unfit", "unsupported", "w4a16_matmul"]

MOST_TOKENS = 4
_SLICES = 8  # of 16 inputs in a k_tile
_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTERS = ("x", "words", "scales", "zeros", "bias", "out")
_INTEGERS = ("tokens", "outputs", "inputs", "k_tiles", "padded", "slices_per_group", "tiles_per_group", "half",
             "scale_kind")  # fmt: skip


class Gemv(ctypes.Structure):
    """`struct Gemv` of csrc/gemv.cu, field for field."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int32) for name in _INTEGERS))


def unsupported(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> str | None:
    """Why a call cannot run here; the first call on a card builds the library and remembers what came of it."""
    if interpreting():
        return "TRITON_INTERPRET is set"
    if x.device.type != "cuda":
        return f"tensors are on {x.device.type}, not on an NVIDIA card"
    reason = unfit(x, weight, offsets) or triton_unsupported(x)
    return reason or build.why_not("gemv", device_info(x.device).arch, x.device)


def unfit(x: Tensor, weight: RepackedWeight, offsets: Tensor | None) -> str | None:
    """Why csrc/gemv.cu does not compute this product, whatever the card; None where it does."""
    if x.shape[0] > MOST_TOKENS:
        return f"{x.shape[0]} tokens, it takes up to {MOST_TOKENS}"
    if offsets is not None:
        return "the weight is grouped by expert"
    if weight.layout != TILES or weight.bits != 4:
        return f"the weight has {weight.bits} bits as {weight.layout!r}: it reads {TILES!r} of 4 bits"
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.scales.dtype not in _SCALE_KINDS:
        return f"x is {x.dtype} and scales are {weight.scales.dtype}: it takes 16-bit x, and scales of 16 or 32 bits"
    if weight.in_features % 4 or not takes_group(weight.group_size, weight.in_features):
        return f"{weight.in_features} inputs in groups of {weight.group_size}: multiples of 4 in groups that fit tiles"
    return None


def w4a16_matmul(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `sarqc_kernels.w4a16.w4a16_matmul`; takes what `unsupported` lets through."""
    out = x.new_empty((x.shape[0], weight.out_features))
    if not x.shape[0]:
        return out
    library = bind(build.library("gemv", device_info(x.device).arch))
    x, bias = _aligned(x.contiguous()), None if bias is None else bias.to(x.dtype).contiguous()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.device_of(x):
        error = library.sarqc_gemv(filled(x, weight, bias, out), stream)
    if error:
        raise BackendError(f"csrc/gemv.cu did not launch: {library.sarqc_error(error).decode()}")
    return out


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions told. Raises BackendError where its struct is not ours."""
    library.sarqc_gemv.argtypes = (ctypes.POINTER(Gemv), ctypes.c_void_p)
    library.sarqc_error.restype = ctypes.c_char_p
    size = library.sarqc_gemv_size()
    if size != ctypes.sizeof(Gemv):
        raise BackendError(f"struct Gemv has {size} bytes in csrc and {ctypes.sizeof(Gemv)} here: reinstall")
    return library


def filled(x: Tensor, weight: RepackedWeight, bias: Tensor | None, out: Tensor) -> Gemv:
    """What the launcher gets; x contiguous, bias in x's dtype."""
    whole = weight.group_size == weight.in_features
    return Gemv(
        x=x.data_ptr(),
        words=weight.words.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=None if weight.zeros is None else weight.zeros.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        tokens=x.shape[0],
        outputs=weight.out_features,
        inputs=weight.in_features,
        k_tiles=weight.words.shape[2],
        padded=weight.words.shape[1] * TILE_N,
        slices_per_group=_SLICES // groups_per_tile(weight.group_size, weight.in_features),
        tiles_per_group=weight.words.shape[2] if whole else max(1, weight.group_size // TILE_K),
        half=x.dtype == torch.float16,
        scale_kind=_SCALE_KINDS[weight.scales.dtype],
    )


def _aligned(x: Tensor) -> Tensor:
    """x where four neighbouring inputs can be read at once; a copy of a view that begins elsewhere."""
    return x if x.data_ptr() % 8 == 0 else x.clone()
