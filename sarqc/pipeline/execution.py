"""How a run is executed: device, batch sizes, memory, ranks, progress. None of it is part of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sarqc.config import GRAM_BUDGET
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm
from sarqc.pipeline.forward import IN_PLACE, Memory
from sarqc.pipeline.journal import OnProgress
from sarqc.pipeline.streams import windows_at_once


@dataclass(frozen=True)
class Execution:
    """Device, budgets and ranks of a run.

    Attributes:
        device: Where blocks run.
        dtype: Of weights and hidden states on the way; the model's by default.
        micro_batch: Sequences in one forward; by default `windows_at_once`.
        folds: Parts of the text whose Grams are kept apart; by default two where something is validated.
        gram_budget: Bytes of Grams at a time; experts beyond it are summed in further portions.
        comm: The ranks of the run. Each gets all tokens, takes sequences of its own, and yields the results of all.
        memory: How suspended micro-batches are held.
        prefetch: Whether a thread reads the next block's tensors while a block is at work.
        bit_widths: Bits of every Linear by the checkpoint's name, where layers have different ones.
        seed: Of random draws outside the choice of sequences.
        on_progress: Called as on_progress(block, stage).
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    micro_batch: int | None = None
    folds: int | None = None
    gram_budget: int = GRAM_BUDGET
    comm: Comm = SINGLE_PROCESS
    memory: Memory = IN_PLACE
    prefetch: bool = False
    bit_widths: Mapping[str, int] | None = None
    seed: int = 0
    on_progress: OnProgress | None = None

    @property
    def place(self) -> torch.device:
        """The device as torch's type."""
        return torch.device(self.device)

    def sequences_at_once(self, seqlen: int) -> int:
        """Sequences of `seqlen` tokens in one forward."""
        return self.micro_batch or windows_at_once(self.place, seqlen, self.dtype)
