"""A text on its way through a model that is loaded one block at a time: what waits is hidden states, not weights.

So a model is judged that does not fit into memory, many quantized forms of it in turn, and no second copy of it is ever
expanded. A reference is kept as what leaves its last block; its logits are made from that again, some positions at a
time, whenever something is compared with it. That costs one product with the output embedding per comparison, a fifth
of a small model's forward and less of a large one's. Keeping the logits would take tokens x vocabulary floats (100 MB
for 512 tokens of SmolLM2), and of their top alone the divergence could only be bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sarqc.contexts import Closing
from sarqc.errors import ModelError
from sarqc.model.dataset import Windows
from sarqc.model.lazy_model import LazyModel
from sarqc.model.perplexity import POSITIONS_AT_ONCE, Tally
from sarqc.model.source import TensorSource
from sarqc.model.tokenizer import check_tokens
from sarqc.pipeline.forward import Forward
from sarqc.pipeline.points import Hooks
from sarqc.pipeline.stored_states import output_form, replaying
from sarqc.pipeline.streams import windows_at_once
from sarqc.pipeline.task import Task


@dataclass(frozen=True)
class BlockOutput:
    """What leaves the last block. hidden: [S, L, H] on the host. form: how that block returns it."""

    hidden: Tensor
    form: str


class BlockwiseForward(Closing):
    """Windows of tokens int64 [S, L] in a model's own forward, block after block. A context. Needs `load_outer`."""

    def __init__(self, lazy: LazyModel, tokens: Tensor) -> None:
        check_tokens(tokens, lazy.model)
        self._lazy = lazy
        self._form: str | None = None
        at_once = windows_at_once(lazy.device, tokens.shape[1])
        calls: list[Callable[[], object]] = [partial(self._run, part) for part in tokens.split(at_once)]
        self._hooks = Hooks(lazy.blocks)
        self._forward = Forward(calls, lazy.blocks, skipped=lazy.skipped)
        self._forward.enter(0)

    def finish_block(self, index: int) -> None:
        """Bring all windows to the end of a block, which is loaded."""
        for arrival in self._forward.leave(index):
            self._form = output_form(arrival)

    def hidden_states(self) -> BlockOutput:
        """What leaves the last block, which all windows are through."""
        leaving = self._forward.leave(len(self._lazy.blocks) - 1)
        hidden = torch.cat([arrival.x.cpu() for arrival in leaving])
        if self._form is None:
            raise ModelError(
                f"{self._lazy.prefix} return more than one tensor, so they cannot be evaluated block by block"
            )
        return BlockOutput(hidden, self._form)

    def close(self) -> None:
        """End the forward."""
        self._forward.close()
        self._hooks.close()

    def _run(self, tokens: Tensor) -> object:
        return self._lazy.model.base_model(input_ids=tokens.to(self._lazy.device), use_cache=False)


def last_block_output(
    lazy: LazyModel, source: TensorSource, tokens: Tensor, on_block: Callable[[int], None] | None = None
) -> BlockOutput:
    """Tokens int64 [S, L] through all blocks; needs `load_outer`. on_block(index) is called after each block."""
    with BlockwiseForward(lazy, tokens) as forward:
        for index in range(len(lazy.blocks)):
            lazy.load_block(index, source, lazy.device, lazy.dtype)
            forward.finish_block(index)
            lazy.unload_block(index)
            if on_block:
                on_block(index)
        return forward.hidden_states()


def score(
    lazy: LazyModel,
    windows: Windows,
    output: BlockOutput,
    reference: BlockOutput | None = None,
    original: LazyModel | None = None,
) -> Tally:
    """Sums over all positions of all windows, of what leaves the last block and of what left a reference's.

    Needs `load_outer(..., head=True)`. original: the model of the reference, where its head is another one.
    """
    tally = Tally()
    for at, window in enumerate(windows.tokens):
        for start in range(0, len(window) - 1, POSITIONS_AT_ONCE):
            stop = min(start + POSITIONS_AT_ONCE, len(window) - 1)
            own = logits(lazy, output.form, output.hidden[at : at + 1, start:stop])
            expected = None
            if reference is not None:
                expected = logits(original or lazy, reference.form, reference.hidden[at : at + 1, start:stop])
            tally.add(own, window[start + 1 : stop + 1].to(own.device), expected)
    return tally


def logits(lazy: LazyModel, form: str, hidden: Tensor) -> Tensor:
    """Logits [L, V] of what leaves the last block, [1, L, H]; needs `load_outer(..., head=True)`."""
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=lazy.device)

    def run() -> Tensor:
        output: Tensor = lazy.model(input_ids=tokens, use_cache=False).logits
        return output

    with replaying(lazy.layers, len(lazy.blocks), form, lambda _: hidden.to(lazy.device)):
        result = Task(run, 0, lambda _: False).resume()
    assert isinstance(result, Tensor)
    return result[0]
