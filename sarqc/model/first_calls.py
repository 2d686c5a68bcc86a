"""The first call of a function of MKL's vector library, made alone, before several threads make it at once.

torch computes cos, exp and their like on a CPU through that library, which chooses a kernel for each function on its
first call. Where that call is shared by threads of a busy machine, one of them may run a kernel of low accuracy for its
part, that once (seen here: cosines of rotary embeddings off by 1.5e-4; https://github.com/pytorch/pytorch/issues/188792).
Then the same input does not give the same bytes. One element is no work to share.
"""

from __future__ import annotations

import functools

import torch

FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf)
"""What models and the method compute with, of those that go through the library."""


@functools.cache
def settle() -> None:
    """Call each of `FUNCTIONS` once in this process, on one element in fp32 and fp64."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in FUNCTIONS:
            function(one)
