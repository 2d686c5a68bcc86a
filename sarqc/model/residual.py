"""Where a layer's outputs join the stream as they are: there it can make up for what the stream has drifted.

Which layer that is, is seen and proved, not looked up. Best is the end of the block: whatever is added to such outputs
leaves the block unchanged, which is tried with noise of the stream's own size. down_proj of a dense block passes, and
so does a shared expert's; routed experts do not, whose outputs are weighted token by token, nor does a layer behind
which a gate or a norm stands. A block without such a layer may have a joint in its middle: there some module reads the
sum of what entered the block and of what a layer puts out, as the norm before the experts does with o_proj's.
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
"""Of the noise's norm, what may be lost of it to rounding."""


@torch.no_grad()
def find_residual_write(
    skeleton: Skeleton, index: int, sites: Sequence[Site], hidden: Tensor
) -> tuple[str, ResidualWrite] | None:
    """The name of the site of block `index`, which is loaded, whose outputs join the stream, the last of those that do,
    and where; None without one.

    hidden: [B, L, H], what enters the block.
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
