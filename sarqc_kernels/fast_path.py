"""When a call may go straight to its kernel instead of through torch's dispatcher.

The dispatcher turns a dozen arguments of an operation into its own values and back: 6 to 9 microseconds of a call, half
of what an eager decode step has for it, and for nothing where nobody looks. It is for those who look: a compiler that
traces, a dispatch mode, a subclass of Tensor, a device that holds no numbers, autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["takes_fast_path"]


def takes_fast_path(x: Tensor) -> bool:
    """Whether a call on `x` means the same without the dispatcher: a plain tensor on a CPU or a GPU, no mode active."""
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not x.requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )
