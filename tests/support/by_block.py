"""Blocks of a lazily loaded model called by hand, to say what a run should have seen; needs `load_outer`."""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.model.lazy_model import Skeleton
from sarqc.pipeline import passage
from sarqc.pipeline.forward import BlockCall, Forward
from sarqc.pipeline.handed import handing_on
from sarqc.pipeline.points import Arrival, Hooks, Point


def _entry(skeleton: Skeleton, index: int, tokens: Tensor) -> Arrival:
    def run() -> object:
        return skeleton.model.base_model(input_ids=tokens.to(skeleton.device), use_cache=False)

    nothing = torch.zeros(*tokens.shape, skeleton.text_config.hidden_size, dtype=skeleton.dtype)
    with Hooks(skeleton.blocks), Forward([run], skeleton.blocks, first=index) as forward:
        with handing_on(skeleton.layers, index, "tensor", lambda _: nothing):
            (entry,) = forward.at(Point("enter", index))
        return Arrival(entry.point, entry.tensor, args=entry.args, kwargs=entry.kwargs)


def embed(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """What enters the first block."""
    return _entry(skeleton, 0, tokens).x


def block_call(skeleton: Skeleton, index: int, hidden: Tensor) -> BlockCall:
    """A block, entered with these hidden states [B, L, H] and the arguments that the model gives it for their shape."""
    entry = _entry(skeleton, index, torch.zeros(hidden.shape[:2], dtype=torch.int64))
    args = tuple(hidden if value is entry.tensor else value for value in entry.args)
    kwargs = {name: hidden if value is entry.tensor else value for name, value in entry.kwargs.items()}
    return BlockCall(skeleton.blocks[index], Arrival(entry.point, hidden, args=args, kwargs=kwargs))


@torch.no_grad()
def call_block(skeleton: Skeleton, index: int, hidden: Tensor) -> Tensor:
    """What leaves a block that is entered with hidden states [B, L, H]."""
    return block_call(skeleton, index, hidden)()


def finish(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """Logits [B, L, V] of what leaves the last block."""
    return torch.stack([passage.logits(skeleton, "tensor", window[None]) for window in hidden])
