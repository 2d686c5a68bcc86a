"""A model run over windows of text one block at a time: what waits on the host is hidden states, not weights.

So a model is judged that does not fit into memory, many quantized forms of it in turn, and no second copy of it is ever
expanded. A reference is kept as the hidden states that leave its last block; its logits are made from them again,
position by position, whenever something is compared with it. That costs one product with the output embedding per
comparison, a fifth of a small model's forward and less of a large one's. Keeping the logits would take tokens x
vocabulary floats (100 MB for 512 tokens of SmolLM2), and of their top alone the divergence could only be bounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sarqc.model.dataset import Windows
from sarqc.model.lazy_model import Skeleton
from sarqc.model.perplexity import POSITIONS_AT_ONCE, Tally
from sarqc.model.source import TensorSource
from sarqc.pipeline.activations import cut, embed, windows_at_once


@torch.no_grad()
def enter(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """Hidden states [S, L, H] on the host before block 0, of tokens int64 [S, L]; needs `load_outer`."""
    batches = cut(len(tokens), windows_at_once(skeleton.device, tokens.shape[1]), 1)
    return embed(skeleton, tokens, batches)[0]


@torch.no_grad()
def through(skeleton: Skeleton, index: int, hidden: Tensor) -> None:
    """Move hidden states [S, L, H] through block `index`, in place; needs `load_block`."""
    for part in hidden.split(windows_at_once(skeleton.device, hidden.shape[1])):
        part.copy_(skeleton.call_block(index, part.to(skeleton.device)))


@torch.no_grad()
def leave(
    skeleton: Skeleton, source: TensorSource, tokens: Tensor, on_block: Callable[[int], None] | None = None
) -> Tensor:
    """Hidden states [S, L, H] after the last block; needs `load_outer`. on_block(index) is called before each block."""
    hidden = enter(skeleton, tokens)
    for index in range(len(skeleton.blocks)):
        if on_block:
            on_block(index)
        skeleton.load_block(index, source, skeleton.device, skeleton.dtype)
        through(skeleton, index, hidden)
        skeleton.unload_block(index)
    return hidden


@torch.no_grad()
def judge(skeleton: Skeleton, windows: Windows, hidden: Tensor, reference: Tensor | None = None) -> Tally:
    """Sums over all positions of all windows, of what leaves the last block and of what left a reference's.

    hidden, reference: [S, L, H] on the host. Needs `load_outer(..., head=True)`; both share that head.
    """
    tally = Tally()
    for at, window in enumerate(windows.tokens):
        for start in range(0, len(window) - 1, POSITIONS_AT_ONCE):
            stop = min(start + POSITIONS_AT_ONCE, len(window) - 1)
            own = _logits(skeleton, hidden[at : at + 1, start:stop])
            expected = None if reference is None else _logits(skeleton, reference[at : at + 1, start:stop])
            tally.add(own, window[start + 1 : stop + 1].to(own.device), expected)
    return tally


def _logits(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    return skeleton.finish(hidden.to(skeleton.device))[0]
