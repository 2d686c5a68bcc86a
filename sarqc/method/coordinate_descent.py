"""After the greedy pass: codes and scales improve each other (`sarqc_kernels.columns.descent` says how).

The greedy solver fixes a group's scale before it rounds the group's columns, and a column before it rounds those behind
it. Given all that it chose, coordinate descent lowers the same objective tr[E H E^T], with the regulariser in H.
"""

from __future__ import annotations

from torch import Tensor

from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import coordinate_descent


def descend(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, cd_passes: int) -> QuantizedWeight:
    """`quantized` after `cd_passes` passes over its groups; no row is worse in `hessian`.

    Args:
        weight: fp32 [E, N, K].
        quantized: its codes, scales and zeros. Zeros stay what they are.
        hessian: fp32 [E, K, K], symmetric. An expert with a diagonal that is not finite and positive stays as it is.
        cd_passes: passes over all groups.
    """
    codes, scales = coordinate_descent(
        weight, quantized.codes, quantized.scales, quantized.zeros, hessian, bits=quantized.bits, passes=cd_passes
    )
    return QuantizedWeight(codes, scales, quantized.zeros, quantized.bits)
