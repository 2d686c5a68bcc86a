"""Which layers write into the residual stream, and where: there they can make up for what it has drifted.

Which layers those are is seen and proved, not looked up. At the end of a block: whatever is added to such outputs
leaves the block unchanged, which is tried with noise of the stream's own size. down_proj of a dense block passes, and
so does a shared expert's; routed experts do not, whose outputs are weighted token by token, nor does a layer behind
which a gate or a norm stands. Inside a block: some module reads the sum of what entered the block and of what a layer
puts out, as the norm before the MLP does with o_proj's; changing the stream there in place has to be the same as
changing what the layer puts out, to the bit.
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


Run = Callable[[], Tensor]
"""A block on a few tokens: what leaves it, [B, L, H]."""


@torch.no_grad()
def residual_writes(
    skeleton: Skeleton, index: int, sites: Sequence[Site], hidden: Tensor, run: Run, *, inside: bool = True
) -> dict[str, ResidualWrite]:
    """Where the outputs of sites of a loaded block join the stream, by the site's name: at most one at each place.

    sites: in the order of their calls. hidden: [B, L, H], what enters the block in `run`. inside: also look for places
    before the block's end; without it only where the end has none.
    """
    dense = [site for site in reversed(sites) if site.experts == 1 and len(site.members) == 1]
    whole = [site for site in dense if site.members[0].shape[0] == hidden.shape[-1]]
    found: dict[str, ResidualWrite] = {}
    ending = next((site for site in whole if _ends(skeleton, site, run)), None)
    if ending is not None:
        found[ending.name] = ResidualWrite(None)
    for site in whole if inside or not found else ():
        reader = None if site is ending else _reader(skeleton, index, site, hidden, run)
        if reader is not None and ResidualWrite(reader) not in found.values():
            found[site.name] = ResidualWrite(reader)
    return found


def _ends(skeleton: Skeleton, site: Site, run: Run) -> bool:
    """Whether noise that is added to what a site puts out leaves the block as it is."""
    expected = run()
    size = expected.float().pow(2).mean().sqrt()
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected.device) * size
    noise = noise.to(expected.dtype)
    with _writing(skeleton, site, lambda out: out + noise.view(out.shape)):
        found = run()
    lost = (found - expected - noise).float().norm() / noise.float().norm()
    return bool(lost < TOLERANCE[expected.dtype])


def _reader(skeleton: Skeleton, index: int, site: Site, hidden: Tensor, run: Run) -> str | None:
    """The first module to read the sum of `hidden` and of what a site puts out, to the bit, if it reads the stream
    itself: emptying that of what the site puts out, where it is read, has to be what the site leaves out."""
    stream: list[Tensor] = []
    readers: list[tuple[str, Tensor, int]] = []

    def look(name: str, x: Tensor) -> None:
        if stream and torch.equal(x, stream[0]):
            readers.append((name, x, x._version))

    with ExitStack() as hooks:
        hooks.enter_context(_writing(skeleton, site, lambda out: stream.append(hidden + out.view(hidden.shape))))
        for name, module in skeleton.blocks[index].named_modules(prefix=f"{skeleton.prefix}.{index}"):
            hooks.enter_context(reading(module, partial(look, name)))
        expected = run()
    if not readers or readers[0][1]._version != readers[0][2]:  # somebody writes into it later
        return None
    name = readers[0][0]
    with _writing(skeleton, site, torch.zeros_like):
        without = run()
    with reading(skeleton.model.get_submodule(name), lambda x: x.copy_(hidden)):
        emptied = run()
    return name if torch.equal(without, emptied) and not torch.equal(without, expected) else None


@contextmanager
def _writing(skeleton: Skeleton, site: Site, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Hand what a site puts out to `change`, and put out what it answers, if it does."""
    module = skeleton.model.get_submodule(site.members[0].module)
    handle = module.register_forward_hook(lambda _module, _args, out: change(out))
    try:
        yield
    finally:
        handle.remove()
