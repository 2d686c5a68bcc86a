"""Triton's interpreter, made fit to hold kernels on a CPU: bf16 done right, loops that run with a recent numpy.

The interpreter of triton 3.6 to 3.9 keeps bf16 as raw 16-bit integers in numpy. So `tl.dot` multiplies bit patterns,
arithmetic works on them without a complaint, and casts to bf16 cut bits off instead of rounding. Inline PTX it refuses.
`repair()` changes six things and nothing else:

1. `tl.dot` widens bf16 operands to fp32 (exact) before it multiplies;
2. casts from bf16 are exact, casts to bf16 round to nearest even, through fp32 where they come from another type;
   what is too large for fp16 becomes infinite (triton 3.9 makes NaN of it);
3. sums, products and comparisons of bf16 go through fp32 and are rounded once, as a GPU does; other arithmetic on
   bf16 raises TypeError: a kernel has to say `.to(tl.float32)`;
4. inline PTX is emulated (`ptx`), so that the text that a GPU would run is what is tested;
5. comparisons are of type int1: triton 3.9 makes integers of a scalar one where it meets a block;
6. reads and writes out of bounds, and races between programs, end the launch (`watch`).

Moving bf16 (load, store, `tl.where`, reshape, |x|) is right as it is. What stays unlike a GPU: `input_precision` is
ignored (an fp32 dot is plain fp32), and programs run one after another.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.kernels import ptx
from tests.kernels.watch import Memory

VARIABLE = "TRITON_INTERPRET"


def prepare() -> str:
    """The device for kernel tests: "cuda" where there is one, otherwise "cpu" with the interpreter set up.

    Has to run before anything imports triton, which reads the variable then; raises RuntimeError if it comes too late.
    """
    wished = os.environ.get(VARIABLE, "") not in ("", "0")
    if torch.cuda.is_available() and not wished:
        return "cuda"
    if not wished and "triton" in sys.modules:
        raise RuntimeError(f"triton was imported before {VARIABLE} could be set: set {VARIABLE}=1 outside")
    os.environ[VARIABLE] = "1"
    try:
        import triton.runtime.interpreter as module
    except ImportError:
        return "cpu"  # without triton its tests are skipped, with that reason
    repair(module)
    return "cpu"


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16 (uint16), to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding up could carry a NaN's bits over to zero
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 -> fp32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def repair(module: Any) -> None:
    """Patch `triton.runtime.interpreter`, once."""
    builder, handle = module.InterpreterBuilder, module.TensorHandle
    if hasattr(builder, "sarqc_repaired"):
        return
    builder.sarqc_repaired = True
    bfloat16, float16, float32, int1 = (getattr(module.tl, name) for name in ("bfloat16", "float16", "float32", "int1"))

    def is_bf16(value: Any) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == bfloat16

    def wide(value: Any) -> Any:
        return handle(widen_bf16(value.data), float32) if is_bf16(value) else value

    def widening(dot: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)

    def rounding(cast: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(cast)
        def wrapper(self: Any, source: Any, target: Any, *mode: Any) -> Any:
            scalar, nearest = target.scalar, module._ir.ROUNDING_MODE.RTZ not in mode
            if source.dtype.scalar == scalar:
                return source
            source = wide(source)
            if scalar == bfloat16 and nearest:
                return handle(round_to_bf16(source.data.astype(np.float32)), bfloat16)
            if scalar == float16 and nearest:
                with np.errstate(over="ignore"):
                    return handle(source.data.astype(np.float16), float16)
            return source if source.dtype.scalar == scalar else cast(self, source, target, *mode)

        return wrapper

    def refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def wrapper(self: Any, *values: Any, **options: Any) -> Any:
            if any(map(is_bf16, values)):
                raise TypeError("arithmetic on bf16: the interpreter would use its bits; widen with .to(tl.float32)")
            return operation(self, *values, **options)

        return wrapper

    def rounded(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def wrapper(self: Any, first: Any, second: Any, op: Any) -> Any:
            both = is_bf16(first) and is_bf16(second)
            if not both:
                result = refusing(operation)(self, first, second, op)
            else:  # fp32 has more than twice the bits: one rounding
                result = operation(self, wide(first), wide(second), op)
            if result.data.dtype == np.bool_:
                return handle(result.data, int1)
            return handle(round_to_bf16(result.data), bfloat16) if both else result

        return wrapper

    def assembly(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
        kinds = [module._get_np_dtype(each) for each in types]
        result = ptx.elementwise(text, [value.data for value in values], kinds, pack)
        return ptx.Results([handle(data, each.scalar) for data, each in zip(result, types)])

    builder.create_dot = widening(builder.create_dot)
    builder.binary_op = rounded(builder.binary_op)
    builder.get_bf16 = lambda self, value: handle(round_to_bf16(np.array([value])), bfloat16)
    builder.create_inline_asm = assembly
    for name in ("cast_impl", "create_fp_to_fp"):  # the other casts are written in terms of cast_impl
        setattr(builder, name, rounding(getattr(builder, name)))
    for name in ("unary_op", "create_clampf", "create_fma"):  # not ternary_op: tl.where only moves bits
        setattr(builder, name, refusing(getattr(builder, name)))
    module._patch_lang_tensor = _scalar_bounds(module._patch_lang_tensor)
    _watched(module)


def _watched(module: Any) -> None:
    """Every launch tells a `Memory` its arguments, every program its ids, every load and store its addresses."""
    builder, executor, memory = module.InterpreterBuilder, module.GridExecutor, Memory()
    host, enter = executor._init_args_hst, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store

    def bytes_of(pointers: Any) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def begin(self: Any, arguments: Any, keywords: Any) -> Any:
        on_host = host(self, arguments, keywords)
        memory.begin((*on_host[0], *on_host[1].values()))
        return on_host

    def entering(self: Any, x: int, y: int, z: int) -> None:
        memory.enter((x, y, z))
        enter(self, x, y, z)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.load(pointers.data, np.asarray(mask.data), bytes_of(pointers))
        return load(self, pointers, mask, *rest, **named)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.store(pointers.data, np.asarray(mask.data), bytes_of(pointers))
        return store(self, pointers, value, mask, *rest, **named)

    executor._init_args_hst, builder.set_grid_idx = begin, entering
    builder.create_masked_load, builder.create_masked_store = loading, storing


def _scalar_bounds(patch: Callable[..., None]) -> Callable[..., None]:
    """Loop bounds are arrays of one element, which numpy >= 2.4 no longer takes for an int (repaired in triton 3.7)."""

    @functools.wraps(patch)
    def wrapper(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return wrapper
