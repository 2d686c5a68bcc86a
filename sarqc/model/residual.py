"""Find the layer whose outputs are added to the residual stream unchanged: it can correct the error of earlier layers.

The layer is found by a test and not by name. The end of the block is best: noise added to the outputs of such a layer
leaves the block unchanged. down_proj of a dense block passes, and so does that of a shared expert. Routed experts do
not, because their outputs are weighted per token, nor does a layer followed by a gate or a norm. Otherwise the layer
may write in the middle of the block: some module reads the sum of the block's input and of the layer's output, as the
norm before the experts does after o_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from sarqc.model.lazy_model import Skeleton
from sarqc.model.sites import ResidualWrite, Site, reading

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""Share of the noise's norm that rounding may take."""


@torch.no_grad()
def find_residual_write(
    skeleton: Skeleton, index: int, sites: Sequence[Site], hidden: Tensor
) -> tuple[str, ResidualWrite] | None:
    """The last site of block `index`, which is loaded, that writes to the residual stream, and where; None without one.

    hidden: [B, L, H], the input of the block.
    """
    dense = [site for site in reversed(sites) if site.experts == 1 and len(site.members) == 1]
    whole = [site for site in dense if site.members[0].shape[0] == hidden.shape[-1]]
    ending = next((site for site in whole if _ends(skeleton, index, site, hidden)), None)
    if ending is not None:
        return ending.name, ResidualWrite(None)
    readers = ((site, _reader(skeleton, index, site, hidden)) for site in whole)
    return next(((site.name, ResidualWrite(reader)) for site, reader in readers if reader), None)


def through(skeleton: Skeleton, index: int, reader: str | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves the block [B, L, H], and what `reader` reads in it; without one, twice the same tensor."""
    inside: list[Tensor] = []
    with ExitStack() as hooks:
        if reader is not None:
            hooks.enter_context(reading(skeleton.model.get_submodule(reader), inside.append))
        leaving = skeleton.call_block(index, hidden)
    return leaving, inside[0] if inside else leaving


def _ends(skeleton: Skeleton, index: int, site: Site, hidden: Tensor) -> bool:
    """Whether noise that is added to what a site puts out leaves the block as it is."""
    expected = skeleton.call_block(index, hidden)
    size = expected.float().pow(2).mean().sqrt()
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected.device) * size
    noise = noise.to(expected.dtype)
    with _writing(skeleton, site, lambda out: out + noise.view(out.shape)):
        found = skeleton.call_block(index, hidden)
    lost = (found - expected - noise).float().norm() / noise.float().norm()
    return bool(lost < TOLERANCE[expected.dtype])


def _reader(skeleton: Skeleton, index: int, site: Site, hidden: Tensor) -> str | None:
    """The first module to read the sum of `hidden` and of what a site puts out, to the bit."""
    stream: list[Tensor] = []
    readers: list[str] = []

    def look(name: str, x: Tensor) -> None:
        if stream and torch.equal(x, stream[0]):
            readers.append(name)

    with ExitStack() as hooks:
        hooks.enter_context(_writing(skeleton, site, lambda out: stream.append(hidden + out.view(hidden.shape))))
        for name, module in skeleton.blocks[index].named_modules(prefix=f"{skeleton.prefix}.{index}"):
            hooks.enter_context(reading(module, partial(look, name)))
        skeleton.call_block(index, hidden)
    return readers[0] if readers else None


@contextmanager
def _writing(skeleton: Skeleton, site: Site, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Hand what a site puts out to `change`, and put out what it answers, if it does."""
    module = skeleton.model.get_submodule(site.members[0].module)
    handle = module.register_forward_hook(lambda _module, _args, out: change(out))
    try:
        yield
    finally:
        handle.remove()
