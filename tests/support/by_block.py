"""Blocks of a lazily loaded model called by hand, to say what a run should have seen; needs `load_outer`."""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.model.lazy_model import LazyModel
from sarqc.pipeline import blockwise_forward
from sarqc.pipeline.forward import BlockCall, Forward
from sarqc.pipeline.points import Arrival, Hooks, Point
from sarqc.pipeline.stored_states import replaying


def _entry(lazy: LazyModel, index: int, tokens: Tensor) -> Arrival:
    def run() -> object:
        return lazy.model.base_model(input_ids=tokens.to(lazy.device), use_cache=False)

    nothing = torch.zeros(*tokens.shape, lazy.text_config.hidden_size, dtype=lazy.dtype)
    with Hooks(lazy.blocks), Forward([run], lazy.blocks, first=index) as forward:
        with replaying(lazy.layers, index, "tensor", lambda _: nothing):
            (entry,) = forward.at(Point("enter", index))
        return Arrival(entry.point, entry.tensor, args=entry.args, kwargs=entry.kwargs)


def embed(lazy: LazyModel, tokens: Tensor) -> Tensor:
    """What enters the first block."""
    return _entry(lazy, 0, tokens).x


def block_call(lazy: LazyModel, index: int, hidden: Tensor) -> BlockCall:
    """A block, entered with these hidden states [B, L, H] and the arguments that the model gives it for their shape."""
    entry = _entry(lazy, index, torch.zeros(hidden.shape[:2], dtype=torch.int64))
    args = tuple(hidden if value is entry.tensor else value for value in entry.args)
    kwargs = {name: hidden if value is entry.tensor else value for name, value in entry.kwargs.items()}
    return BlockCall(lazy.blocks[index], Arrival(entry.point, hidden, args=args, kwargs=kwargs))


@torch.no_grad()
def call_block(lazy: LazyModel, index: int, hidden: Tensor) -> Tensor:
    """What leaves a block that is entered with hidden states [B, L, H]."""
    return block_call(lazy, index, hidden)()


def finish(lazy: LazyModel, hidden: Tensor) -> Tensor:
    """Logits [B, L, V] of what leaves the last block."""
    return torch.stack([blockwise_forward.logits(lazy, "tensor", window[None]) for window in hidden])
