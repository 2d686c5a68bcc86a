"""W4A16: activations times a weight that stays packed, dense or grouped by expert. (2 to 8 bits, despite the name.)

y_t = W_e x_t + b_e for the expert e that row t belongs to, W_e = (code - zero) * scale. `repack` lays a weight out
once, for the device it will be used on (`layout`); `w4a16_matmul` multiplies with it as it lies. The reference takes
a tile of rows out of any layout, multiplies and forgets it; the others never write the weight out, or one tile at a
time, or (Triton, thousands of tokens) one projection for the time of a call.

Bytes against flops: a product of T tokens reads N K (b/8 + grid) bytes of weight and does 2 T N K flops. Up to tens of
tokens the bytes are all that counts, and packed weights are read up to four times faster than 16-bit ones.
"""

from sarqc_kernels.w4a16.experts import w4a16_experts
from sarqc_kernels.w4a16.layout import RepackedWeight, repack, unpack_weight
from sarqc_kernels.w4a16.matmul import implementations, w4a16_matmul
from sarqc_kernels.w4a16.routing import Routing, route
from sarqc_kernels.w4a16.warmup import warm_up

__all__ = [
    "RepackedWeight",
    "Routing",
    "implementations",
    "repack",
    "route",
    "unpack_weight",
    "w4a16_experts",
    "w4a16_matmul",
    "warm_up",
]
