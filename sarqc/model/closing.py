"""Which layer writes last into what leaves a block: seen and proved, not looked up.

The outputs of such a layer are added to the stream as they are, and nothing in the block reads the sum: whatever is
added to them leaves the block unchanged. That is tried, with noise of the stream's own size. down_proj of a dense
block passes, and so does a shared expert's; routed experts do not, whose outputs are weighted token by token, nor does
a layer behind which a norm stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sarqc.model.sites import Site
from sarqc.model.skeleton import Skeleton

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""Of the noise's norm, what may be lost of it to rounding."""


@torch.no_grad()
def find_closing(skeleton: Skeleton, index: int, sites: Sequence[Site], hidden: Tensor) -> str | None:
    """The name of the site of block `index`, which is loaded, that closes it; the last of them, None without one.

    hidden: [B, L, H], what enters the block.
    """
    expected = skeleton.call_block(index, hidden)
    size = expected.float().pow(2).mean().sqrt()
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected.device) * size
    noise = noise.to(expected.dtype)
    for site in reversed(sites):
        if site.experts > 1 or len(site.members) > 1 or site.members[0].shape[0] != expected.shape[-1]:
            continue
        module = skeleton.model.get_submodule(site.members[0].module)
        found = _with_added(skeleton, index, hidden, module, noise)
        lost = (found - expected - noise).float().norm() / noise.float().norm()
        if bool(lost < TOLERANCE[expected.dtype]):
            return site.name
    return None


def _with_added(skeleton: Skeleton, index: int, hidden: Tensor, module: nn.Module, noise: Tensor) -> Tensor:
    """What leaves the block where `noise` is added to what leaves a module in it."""

    def hook(_: nn.Module, args: object, out: Tensor) -> Tensor:
        return out + noise.view(out.shape)

    handle = module.register_forward_hook(hook)
    try:
        return skeleton.call_block(index, hidden)
    finally:
        handle.remove()
