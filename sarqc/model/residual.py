"""Find the layers whose outputs are added to the residual stream unchanged: there the error of earlier layers is
corrected.

The layers are found by tests, not by name. At the end of a block: noise added to the outputs of such a layer leaves the
block unchanged. down_proj of a dense block passes, and so does that of a shared expert. Routed experts do not, because
their outputs are weighted per token, nor does a layer followed by a gate or a norm. Inside a block: some module reads
the sum of the block's input and of the layer's output, as the norm before the MLP does after o_proj. Changing that sum
in place must give the same bits as changing the output of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sarqc.model.lazy_model import LazyModel
from sarqc.model.sites import ResidualWrite, Site, observing_input

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""Of the noise's norm, what may be lost of it to rounding."""


Run = Callable[[], Tensor]
"""A block on a few tokens: what leaves it, [B, L, H]."""


@torch.no_grad()
def residual_writes(
    lazy: LazyModel, index: int, sites: Sequence[Site], hidden: Tensor, run: Run, *, inside: bool = True
) -> dict[str, ResidualWrite]:
    """Where the outputs of sites of a loaded block join the stream, by the site's name: at most one at each place.

    sites: in the order of their calls. hidden: [B, L, H], what enters the block in `run`. inside: also look for places
    before the block's end; without it only where the end has none.
    """
    if hidden.dim() > 3:  # several streams, as hyper-connections have: no layer writes into one of them
        return {}
    dense = [site for site in reversed(sites) if site.experts == 1 and len(site.members) == 1]
    wide = [site for site in dense if site.members[0].shape[0] == hidden.shape[-1]]
    whole = _for_each_token(lazy, wide, hidden, run)
    writes: dict[str, ResidualWrite] = {}
    ending = next((site for site in whole if _ends_block(lazy, site, run)), None)
    if ending is not None:
        writes[ending.name] = ResidualWrite(None)
    for site in whole if inside or not writes else ():
        reader = None if site is ending else _reader(lazy, index, site, hidden, run)
        if reader is not None and ResidualWrite(reader) not in writes.values():
            writes[site.name] = ResidualWrite(reader)
    return writes


def _for_each_token(lazy: LazyModel, sites: Sequence[Site], hidden: Tensor, run: Run) -> list[Site]:
    """Those that put out a row for each of the stream whenever they are called: some are called for a part of it."""
    sizes: dict[str, set[int]] = {site.name: set() for site in sites}
    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(_replacing_output(lazy, site, partial(_note_size, sizes[site.name])))
        run()
    return [site for site in sites if sizes[site.name] == {hidden.numel()}]


def _note_size(sizes: set[int], out: Tensor) -> None:
    sizes.add(out.numel())


def _ends_block(lazy: LazyModel, site: Site, run: Run) -> bool:
    """Whether noise that is added to what a site puts out leaves the block as it is."""
    expected = run()
    size = expected.float().pow(2).mean().sqrt()
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected.device) * size
    noise = noise.to(expected.dtype)
    with _replacing_output(lazy, site, lambda out: out + noise.view(out.shape)):
        actual = run()
    lost = (actual - expected - noise).float().norm() / noise.float().norm()
    return bool(lost < TOLERANCE[expected.dtype])


def _reader(lazy: LazyModel, index: int, site: Site, hidden: Tensor, run: Run) -> str | None:
    """The first module to read the sum of `hidden` and of what a site puts out, to the bit, if it reads the stream
    itself: emptying that of what the site puts out, where it is read, has to be what the site leaves out."""
    stream: list[Tensor] = []
    readers: list[tuple[str, Tensor, int]] = []

    def look(name: str, x: Tensor) -> None:
        if stream and torch.equal(x, stream[0]):
            readers.append((name, x, x._version))

    with ExitStack() as hooks:
        hooks.enter_context(_replacing_output(lazy, site, lambda out: stream.append(hidden + out.view(hidden.shape))))
        for name, module in lazy.blocks[index].named_modules(prefix=f"{lazy.prefix}.{index}"):
            hooks.enter_context(observing_input(module, partial(look, name)))
        expected = run()
    if not readers or readers[0][1]._version != readers[0][2]:  # somebody writes into it later
        return None
    name = readers[0][0]
    with _replacing_output(lazy, site, torch.zeros_like):
        without = run()
    with observing_input(lazy.model.get_submodule(name), lambda x: x.copy_(hidden)):
        emptied = run()
    return name if torch.equal(without, emptied) and not torch.equal(without, expected) else None


def _replacing_output(lazy: LazyModel, site: Site, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Hand what a site puts out to `change`, and put out what it answers, if it does, for the time of the context."""
    module: nn.Module = lazy.model.get_submodule(site.members[0].module)
    return module.register_forward_hook(lambda _module, _args, out: change(out))
