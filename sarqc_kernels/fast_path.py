"""When a call may go straight to its kernel instead of through torch's dispatcher.

The dispatcher converts a dozen arguments of an operation to values of its own and back: 6 to 9 microseconds, half
of what an eager decode step has for it. It is needed for a compiler that traces, a dispatch mode, a subclass of Tensor,
a device without data (meta) and autograd; other calls skip it.
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
