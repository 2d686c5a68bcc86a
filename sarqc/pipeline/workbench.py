"""What a run over blocks works with: the model, the device and its budget, and what to do where memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from sarqc.config import MethodConfig
from sarqc.errors import ResourceError, out_of_memory
from sarqc.method.gram import Statistics
from sarqc.model.lazy_model import Skeleton
from sarqc.model.sites import Share, Site
from sarqc.model.source import PrefetchingSource, TensorSource
from sarqc.pipeline.activations import States
from sarqc.pipeline.comm import Comm
from sarqc.pipeline.passes import gram_bytes, passes
from sarqc.pipeline.quantize_site import SiteQuantizer

OnProgress = Callable[[int, str], None]
Recall = Callable[[int, Sequence[Share]], list[Statistics]]
"""recall(block, shares): what is known of the inputs of these shares, one `Statistics` for each."""
_Result = TypeVar("_Result")


@dataclass
class Workbench:
    """What a run works with, and what is told of the block at work (from `seconds` on)."""

    skeleton: Skeleton
    source: TensorSource
    method: MethodConfig
    device: torch.device
    dtype: torch.dtype | None
    gram_budget: int
    on_progress: OnProgress
    recall: Recall | None
    solving: SiteQuantizer
    comm: Comm
    prefetched: PrefetchingSource | None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    current: str = ""
    together: int = 1  # the most matrices whose Grams are held at once, and the bytes of those
    gram_bytes: int = 0

    def load(self, index: int) -> None:
        """Load a block, and begin to read the one behind it."""
        self.skeleton.load_block(index, self.source, self.device, self.dtype)
        if self.prefetched and index + 1 < len(self.skeleton.blocks):
            parameters = self.skeleton.parameters(index + 1)
            self.prefetched.read(piece.name for name in parameters for piece in self.skeleton.pieces[name])

    def portions(self, sites: Sequence[Site], folds: int) -> list[list[Share]]:
        """The sites in portions whose Grams fit the budget; remembers how many of them are held at once."""
        found = list(passes(sites, folds, self.gram_budget))
        self.together = max((sum(share.stop - share.first for share in shares) for shares in found), default=1)
        self.gram_bytes = max((sum(gram_bytes(share, folds) for share in shares) for shares in found), default=0)
        return found

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        """Announce a stage and add its wall time to `seconds`."""
        self.current = name
        self.on_progress(index, name)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def with_memory(self, index: int, states: States | None, attempt: Callable[[], _Result]) -> _Result:
        """`attempt()`, again with less at once for as long as the device runs out of memory."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Only out here are the frames of the attempt gone, and with them the tensors that filled the device.
            _take_less(self, index, states, reason)


def _take_less(work: Workbench, index: int, states: States | None, reason: str) -> None:
    """Halve the micro-batch or the Grams, and load the block again; `ResourceError` where neither can be halved."""
    skeleton, place = work.skeleton, f"{work.device} has no memory left at {work.skeleton.prefix}.{index}"
    skeleton.unload_block(index)
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
    # Replays are each rank's own; in all other stages every rank is here, and must take the same way.
    apart = states is None or work.current == "replay"
    before = 0 if states is None else states.micro_batch
    before = before if apart else max(work.comm.all_gather_object(before))
    if states is not None and work.current not in ("scale", "solve") and before > 1:  # windows have no part in these
        states.halve()
        skeleton.load_outer(work.source, work.device, work.dtype)
        states.prepare(skeleton)
        skeleton.unload_outer()
        work.notes.append(f"{place} ({reason}): micro-batch of {before} windows halved")
    elif states is not None and work.current != "replay" and work.together > 1:
        work.gram_budget = min(work.gram_budget // 2, work.gram_bytes // 2)
        work.notes.append(f"{place} ({reason}): {work.together} Grams at a time halved")
    else:
        raise ResourceError(
            f"{place} ({reason}), with one window and one Gram at a time: use a device with more memory or --device cpu"
        )
    skeleton.load_block(index, work.source, work.device, work.dtype)
