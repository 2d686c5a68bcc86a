"""`quantize_columns` with the column step in CUDA C++ (csrc/columns.cu): a row per thread, 16 columns in registers.

The walk is that of `panels.py`; the panel product and the fit of groups wider than a panel are Triton's
(`triton_impl.Steps`). What a thread does to its row is what `triton_impl._columns` does, with the same roundings; sums
of a search run over a group's columns one after another, where Triton takes 16 side by side.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc_kernels import build
from sarqc_kernels.columns import panels
from sarqc_kernels.columns.config import Config, choose
from sarqc_kernels.columns.grid import TRIALS, Problem
from sarqc_kernels.columns.panels import Action, Work, factors_of, quantize, too_large
from sarqc_kernels.device import device_info, interpreting, triton_unsupported
from sarqc_kernels.errors import BackendError

__all__ = ["Columns", "Steps", "bind", "launch_arguments", "quantize_columns", "unsupported"]

_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTERS = ("weight", "delta", "codes", "pull", "factor", "usable", "inverse", "importance", "group_of", "scales",
             "zeros", "table")  # fmt: skip
_INTEGERS = ("pull_columns", "first", "last", "stretch", "experts", "rows", "columns", "groups", "round", "fit", "sym",
             "trials", "scale_kind")  # fmt: skip
_NUMBERS = ("top", "middle", "tiny", "most")


class Columns(ctypes.Structure):
    """`struct Columns` of csrc/columns.cu, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("factor_expert", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in _NUMBERS),
    )


def unsupported(problem: Problem) -> str | None:
    """Why a call cannot run here; the first call on a card builds the library and remembers what came of it."""
    if interpreting():
        return "TRITON_INTERPRET is set"
    weight = problem.weight
    if weight.device.type != "cuda":
        return f"tensors are on {weight.device.type}, not on an NVIDIA card"
    reason = triton_unsupported(weight) or too_large(weight.shape[2])
    return reason or build.unsupported_reason("columns", device_info(weight.device).arch, weight.device)


def quantize_columns(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """`sarqc_kernels.columns.quantize_columns` with csrc/columns.cu."""
    from sarqc_kernels.columns import triton_impl

    weight = problem.weight
    card = device_info(weight.device)
    own = choose(weight.shape[0], weight.shape[1], card)
    steps = Steps(triton_impl.Steps(own), own, bind(build.library("columns", card.arch)))
    with torch.cuda.device_of(weight):
        return quantize(steps, problem)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions set. Raises BackendError where its struct is not ours."""
    library.sarqc_columns.argtypes = (ctypes.POINTER(Columns), ctypes.c_int, ctypes.c_void_p)
    library.sarqc_error.restype = ctypes.c_char_p
    size = library.sarqc_columns_size()
    if size != ctypes.sizeof(Columns):
        raise BackendError(f"struct Columns has {size} bytes in csrc and {ctypes.sizeof(Columns)} here: reinstall")
    return library


def launch_arguments(work: Work, first: int, last: int, action: Action) -> Columns:
    """What the launcher gets for columns first .. last - 1."""
    rule, fits = work.rule, action == "fit"
    kept = torch.finfo(rule.scale_dtype)
    pointers = {name: getattr(work, name).data_ptr() for name in _POINTERS if name != "table"}
    return Columns(
        **pointers,
        table=factors_of(rule.bits, rule.sym, work.weight.device).data_ptr(),
        factor_expert=work.factor.stride(0),
        pull_columns=work.pull.shape[1],
        first=first,
        last=last,
        stretch=work.group_size if fits else last - first,
        experts=work.experts,
        rows=work.rows,
        columns=work.columns,
        groups=work.scales.shape[1],
        round=action != "free",
        fit=fits,
        sym=rule.sym,
        trials=TRIALS if rule.search else 1,
        scale_kind=_SCALE_KINDS[rule.scale_dtype],
        top=rule.top,
        middle=rule.middle,
        tiny=kept.tiny,
        most=kept.max,
    )


@dataclass(frozen=True)
class Steps:
    """The steps of `panels.py`: columns by the library, all else as `shared` does it. On the current stream."""

    shared: panels.Steps
    config: Config
    library: ctypes.CDLL

    def pull(self, work: Work, first: int, last: int) -> None:
        """See `panels.Steps`."""
        self.shared.pull(work, first, last)

    def fit(self, work: Work, first: int, last: int) -> None:
        """See `panels.Steps`."""
        self.shared.fit(work, first, last)

    def columns(self, work: Work, first: int, last: int, action: Action) -> None:
        """See `panels.Steps`."""
        stream = torch.cuda.current_stream(work.weight.device).cuda_stream
        error = self.library.sarqc_columns(launch_arguments(work, first, last, action), self.config.rows, stream)
        if error:
            raise BackendError(f"csrc/columns.cu did not launch: {self.library.sarqc_error(error).decode()}")
