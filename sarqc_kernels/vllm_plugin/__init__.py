"""These kernels inside vLLM: a plugin of its group `vllm.general_plugins`, which every one of its processes loads.

It does nothing unless the environment variable SARQC_VLLM is 1. Then packed Linears (compressed-tensors and GPTQ) are
offered to these kernels before vLLM's own, and packed experts of both run in `w4a16_experts`. A layer
that they cannot take goes to vLLM's own kernels; the log has the reason, once for each.
"""

from __future__ import annotations

import os

VARIABLE = "SARQC_VLLM"


def register() -> None:
    """What vLLM calls in each of its processes, possibly more than once."""
    asked = os.environ.get(VARIABLE, "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} = {asked!r} is not known: use 1 for sarqc's kernels, 0 or nothing for vLLM's own")
    if asked == "1":
        from sarqc_kernels.vllm_plugin import experts, linear

        linear.offer()
        experts.offer()
