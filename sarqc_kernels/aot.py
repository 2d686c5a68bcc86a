"""GPUs for which machine code is checked ahead of time, by `benchmarks.aot`."""

__all__ = ["ARCHS", "TENSOR_CORE"]

TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The tensor cores' instruction of each compute capability (times ten). sm_120 has that of sm_80."""

ARCHS = tuple(TENSOR_CORE)
