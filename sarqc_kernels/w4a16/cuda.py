"""Few tokens in CUDA C++ (csrc/gemv.cu): tensor cores on packed tiles, dense or by expert, one launch, no workspace.

A library holds one width, one dtype of x and one of the scales, built when first needed. What it cannot take (other
widths, groups that are no eighth of a tile, no nvcc) the Triton kernels take.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sarqc_kernels import build
from sarqc_kernels.device import device_info, interpreting, on_device, triton_unsupported
from sarqc_kernels.errors import BackendError
from sarqc_kernels.w4a16.config import groups_per_tile, takes_group
from sarqc_kernels.w4a16.gemv import MOST_GROUPED_ROWS, MOST_TOKENS, GemvPlan, gemv_plan
from sarqc_kernels.w4a16.layout import TILE_K, TILE_N, TILES, RepackedWeight
from sarqc_kernels.w4a16.routing import Routing

__all__ = [
    "BITS",
    "Gemv",
    "bind",
    "defines",
    "launch_arguments",
    "product",
    "unsupported",
    "unsupported_experts",
    "unsupported_product",
    "w4a16_experts",
    "w4a16_matmul",
]  # fmt: skip

BITS = (2, 3, 4, 8)
_SLICES = 8  # of 16 inputs in a tile
_MOST_TILES = 1000  # of a row: places of tiles are exact up to there
_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTERS = ("x", "words", "scales", "zeros", "bias", "out", "offsets", "index")
_INTEGERS = ("rows", "outputs", "inputs", "k_tiles", "padded", "groups", "experts", "slices_per_group", "scale_bytes",
             "zero_bytes", "place_of_tile", "gated", "warps_n", "splits", "chunk")  # fmt: skip


class Gemv(ctypes.Structure):
    """`struct Gemv` of csrc/gemv.cu, field for field."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int32) for name in _INTEGERS))


def unsupported(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> str | None:
    """Why a call cannot run here; the first call on a device builds the library and remembers what came of it."""
    if interpreting():
        return "TRITON_INTERPRET is set"
    if x.device.type != "cuda":
        return f"tensors are on {x.device.type}, not on an NVIDIA card"
    reason = unsupported_product(x, weight, x.shape[0], offsets is not None) or triton_unsupported(x)
    return reason or build.unsupported_reason("gemv", device_info(x.device).arch, x.device, defines(x, weight))


def unsupported_experts(x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing) -> str | None:
    """The same for the experts of a layer."""
    if gate_up.out_features % 32:
        return f"gate has {gate_up.out_features // 2} rows: it takes multiples of 16"
    rows = routing.tokens.shape[0]
    for weight in (gate_up, down):
        if reason := unsupported_product(x, weight, rows, grouped=True):
            return reason
    return next(
        (reason for weight in (gate_up, down) if (reason := unsupported(x, weight, routing.offsets, None))), None
    )


def unsupported_product(x: Tensor, weight: RepackedWeight, rows: int, grouped: bool) -> str | None:
    """Why csrc/gemv.cu does not compute this product, whatever the device; None where it does."""
    most = min(MOST_GROUPED_ROWS, 8 * weight.words.shape[0]) if grouped else MOST_TOKENS
    if rows > most:
        return f"{rows} rows, it takes up to {most}"
    if weight.layout != TILES or weight.bits not in BITS:
        return f"the weight has {weight.bits} bits as {weight.layout!r}: it reads {TILES!r} of 2, 3, 4 or 8 bits"
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.scales.dtype not in _SCALE_KINDS:
        return f"x is {x.dtype} and scales are {weight.scales.dtype}: it takes 16-bit x, and scales of 16 or 32 bits"
    if weight.in_features % 8 or not takes_group(weight.group_size, weight.in_features):
        return f"{weight.in_features} inputs in groups of {weight.group_size}: multiples of 8 in groups that fit tiles"
    if weight.words.shape[2] > _MOST_TILES:
        return f"{weight.in_features} inputs, it takes up to {_MOST_TILES * TILE_K}"
    return None


def defines(x: Tensor, weight: RepackedWeight) -> tuple[str, ...]:
    """The macros that choose the library of a call."""
    half, scale = int(x.dtype == torch.float16), _SCALE_KINDS[weight.scales.dtype]
    return (f"SARQC_BITS={weight.bits}", f"SARQC_HALF={half}", f"SARQC_SCALE={scale}")


def w4a16_matmul(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `sarqc_kernels.w4a16.w4a16_matmul`; takes what `unsupported` lets through."""
    return product(x, weight, offsets, bias)


def w4a16_experts(x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing) -> Tensor:
    """See `sarqc_kernels.w4a16.experts`: two launches of csrc/gemv.cu, and the sum over a token's experts by Triton."""
    from sarqc_kernels.w4a16.triton import experts as launcher

    hidden = product(x, gate_up, routing.offsets, None, routing.tokens, gated=True, covered=True)
    rows = product(hidden, down, routing.offsets, None, covered=True)
    with on_device(x):  # Triton launches on the current card, which may be another
        return launcher.combined(rows.unsqueeze(0), x, routing)


def product(
    x: Tensor,
    weight: RepackedWeight,
    offsets: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None = None,
    *,
    gated: bool = False,
    covered: bool = False,
) -> Tensor:
    """[rows, N] of what `unsupported_product` lets through. index, gated, covered: as of `triton.launch.product`."""
    rows = x.shape[0] if index is None else index.shape[0]
    outputs = weight.out_features // 2 if gated else weight.out_features
    make = x.new_zeros if offsets is not None and not covered else x.new_empty
    out: Tensor = make((rows, outputs))
    if not rows:
        return out
    device = device_info(x.device)
    experts = 0 if offsets is None else weight.words.shape[0]
    plan = gemv_plan(rows, outputs, weight.words.shape[2], weight.bits, experts, gated, device)
    x, bias = _aligned(x.contiguous()), None if bias is None else bias.to(x.dtype).contiguous()
    offsets, index = (None if part is None else part.contiguous() for part in (offsets, index))
    call = launch_arguments(x, weight, out, plan, bias=bias, offsets=offsets, index=index, gated=gated)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    library = _library(device.arch, defines(x, weight))
    with torch.cuda.device_of(x):
        error = library.sarqc_gemv(call, plan.columns, plan.blocks, plan.tiles, stream)
    if error:
        raise BackendError(f"csrc/gemv.cu did not launch: {library.sarqc_error(error).decode()}")
    return out


@functools.cache
def _library(arch: int, macros: tuple[str, ...]) -> ctypes.CDLL:
    return bind(build.library("gemv", arch, macros))


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions set. Raises BackendError where its struct is not ours."""
    library.sarqc_gemv.argtypes = (ctypes.POINTER(Gemv), *[ctypes.c_int] * 3, ctypes.c_void_p)
    library.sarqc_error.restype = ctypes.c_char_p
    size = library.sarqc_gemv_size()
    if size != ctypes.sizeof(Gemv):
        raise BackendError(f"struct Gemv has {size} bytes in csrc and {ctypes.sizeof(Gemv)} here: reinstall")
    return library


def launch_arguments(
    x: Tensor,
    weight: RepackedWeight,
    out: Tensor,
    plan: GemvPlan,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    gated: bool = False,
) -> Gemv:
    """What the launcher gets; tensors contiguous, bias in x's dtype."""
    experts, blocks, k_tiles = weight.words.shape[:3]
    padded, groups = blocks * TILE_N, weight.scales.shape[1]
    per_tile = groups_per_tile(weight.group_size, weight.in_features)
    whole = weight.group_size == weight.in_features
    tiles_of_group = k_tiles if whole else max(1, weight.group_size // TILE_K)
    return Gemv(
        x=x.data_ptr(), words=weight.words.data_ptr(), scales=weight.scales.data_ptr(), zeros=_pointer(weight.zeros),
        bias=_pointer(bias), out=out.data_ptr(), offsets=_pointer(offsets), index=_pointer(index), rows=out.shape[0],
        outputs=out.shape[1], inputs=weight.in_features, k_tiles=k_tiles, padded=padded, groups=groups,
        experts=experts, slices_per_group=_SLICES // per_tile, scale_bytes=padded * weight.scales.element_size(),
        zero_bytes=padded, place_of_tile=per_tile if per_tile > 1 else -(-(1 << 20) // tiles_of_group), gated=gated,
        warps_n=plan.warps_n, splits=plan.splits, chunk=plan.chunk,
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """x where eight neighbouring inputs can be read at once; a copy of a view that begins elsewhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
