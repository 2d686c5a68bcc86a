"""How much memory a run will take in each of its stages, and what waits on the host meanwhile. From shapes alone.

Counted is what the loop holds at once. Two things wait beside the block at work: activations of suspended
micro-batches, in memory up to `--activation-budget` and in a file beyond it, and the next block, if it is prefetched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from sarqc.estimation import shapes
from sarqc.method.lambda_search import EXPERTS, TRIAL_BYTES
from sarqc.model.candidates import Target
from sarqc.model.sites import Site, SiteChunk
from sarqc.pipeline.activation_memory import activation_memory
from sarqc.pipeline.grams import gram_bytes, portions
from sarqc.pipeline.plan import Plan
from sarqc.pipeline.sensitivity import TOKENS, TRIED_LENGTH, TRIED_WINDOWS
from sarqc.pipeline.work_split import solving_bytes, work_items
from sarqc.system import host_memory, peak_memory_mib, ranks_here

STAGES = ("embed", "load", "sensitivity", "reference", "forward", "solve", "write")


@dataclass(frozen=True)
class Memory:
    """Bytes of one stage at its peak, of the process on the host and of tensors on the device (0 without a GPU)."""

    stage: str
    host: int
    device: int


@dataclass(frozen=True)
class HostBuffers:
    """Bytes that wait for their turn, of one rank. states: activations of suspended micro-batches in the host's memory.
    mapped: those in a file. prefetched: the next block, read while one is quantized; 0 where it is not. device:
    activations on a GPU.
    """

    states: int
    mapped: int
    prefetched: int
    device: int = 0


def estimate_memory(plan: Plan, windows: int, seqlen: int, ranks: int = 1) -> tuple[HostBuffers, list[Memory]]:
    """Host buffers, and peak memory of each stage with them. The next block is prefetched where there is more than one
    block and this machine has the memory for it on all its ranks."""
    waiting = _buffers(plan, windows, seqlen, ranks)
    stages = memory(plan, windows, seqlen, waiting)
    if waiting.prefetched and max(stage.host for stage in stages) * ranks_here() > host_memory():
        waiting = replace(waiting, prefetched=0)
        stages = memory(plan, windows, seqlen, waiting)
    return waiting, stages


def _buffers(plan: Plan, windows: int, seqlen: int, ranks: int) -> HostBuffers:
    """As in `pipeline.activation_memory`. The reference counts even where the first block will show that no layer
    writes into the stream as it is: it is held until then, and shapes do not show it."""
    buffers = activation_memory(plan, -(-windows // ranks) * seqlen)
    prefetched = max((_stored(plan, index) for index in range(1, len(plan.lazy.units))), default=0)
    if plan.device.type == "cpu":
        return HostBuffers(buffers.in_place, buffers.file, prefetched)
    return HostBuffers(buffers.host, buffers.file, prefetched, buffers.in_place)


def _stored(plan: Plan, index: int) -> int:
    """Bytes of a block in the checkpoint."""
    return sum(shapes.stored_bytes(plan, name) for name in plan.lazy.tensors(index))


def memory(plan: Plan, windows: int, seqlen: int, waiting: HostBuffers) -> list[Memory]:
    """Peak memory of each stage: of the largest block, with the least known of what attention needs."""
    width, states, prefetched = plan.dtype.itemsize, waiting.states, waiting.prefetched
    blocks = shapes.blocks(plan)
    tokens = min(windows, plan.micro_batch(seqlen)) * seqlen if windows else 0
    apart = windows > 1 and (plan.quant.avg_bits is not None or plan.method.needs_validation)
    folds = 0 if not windows else 2 if apart else 1
    tensor = max(shapes.stored_bytes(plan, name) for name in plan.source.names())
    outer = width * _outer(plan)
    probed = sum(len(sites) for _, sites in blocks)  # sites, from each of which a few sequences run on
    tried = (TOKENS + TRIED_WINDOWS * TRIED_LENGTH * probed) * width * plan.lazy.hidden_size
    peaks: dict[str, tuple[int, int]] = dict.fromkeys(STAGES, (0, 0))  # on the device, and on the host beside it
    for index, sites in blocks:
        members = plan.targets.of_block(index)
        block = width * sum(shapes.elements(plan, name) for name in plan.lazy.parameters(index))
        codes = sum(prod(target.shape) for target in members)
        passed, inside = index < plan.lazy.passed, index < len(plan.lazy.blocks)
        grams, solving = _solved(plan, sites, folds if passed else 0)
        flow = tokens * width * (_flow(plan, members) if inside else plan.lazy.hidden_size)  # logits are not made
        needs = {
            "embed": (outer + 2 * tokens * plan.lazy.hidden_size * 4, states + tensor),
            "load": (block + tensor + waiting.device, states + tensor + prefetched),
            "sensitivity": (block + max(grams + solving, flow, width * _largest(sites)), tried + codes),
            "reference": (block + flow + waiting.device, states + prefetched),
            "forward": (block + grams + flow + waiting.device, states + prefetched + codes),
            "solve": (block + grams + solving + waiting.device, states + prefetched + codes),
            # a block's codes beside what they are packed to; in the end a weight beside what it was
            "write": (0, max(states + 2 * codes, 2 * tensor + 6 * _widest(members))),
        }
        for stage, need in needs.items():
            peaks[stage] = max(peaks[stage][0], need[0]), max(peaks[stage][1], need[1])
    if plan.quant.avg_bits is None:
        del peaks["sensitivity"]
    if not plan.method.error_correction:
        del peaks["reference"]
    if not windows:
        peaks = {stage: peak for stage, peak in peaks.items() if stage in ("load", "solve", "write")}
    base = peak_memory_mib()["host"] << 20
    gpu = plan.device.type != "cpu"
    return [
        Memory(stage, base + beside + (0 if gpu else on), on if gpu else 0) for stage, (on, beside) in peaks.items()
    ]


def _widest(members: list[Target]) -> int:
    """Elements of the largest Linear."""
    return max((prod(target.shape) for target in members), default=0)


def _outer(plan: Plan) -> int:
    """Elements of the body outside its blocks."""
    body = f"{plan.lazy.model.base_model_prefix}."
    return sum(
        shapes.elements(plan, name)
        for name in plan.lazy.slices
        if name.startswith(body) and not name.startswith(f"{plan.lazy.prefix}.")
    )


def _solved(plan: Plan, sites: list[Site], folds: int) -> tuple[int, int]:
    """Bytes of the Grams that are held at once, and of solving the largest chunk beside them."""
    portions_of_block = list(portions(sites, folds, plan.run.gram_budget))
    grams = max((sum(gram_bytes(chunk, folds) for chunk in chunks) for chunks in portions_of_block), default=0)
    solved = [item.chunk for chunks in portions_of_block for item in work_items(chunks, 1, plan.device, gram=folds > 0)]
    solving = max((solving_bytes(chunk, folds > 0) for chunk in solved), default=0)
    choosing = (
        max((_choosing(chunk) for chunks in portions_of_block for chunk in chunks), default=0) if folds > 1 else 0
    )
    return grams, max(solving, choosing)


def _largest(sites: list[Site]) -> int:
    """Elements of the largest site, of which the sensitivity analysis keeps a copy while it probes another weight in
    its place.
    """
    return max((sum(prod(target.shape) for target in site.members) for site in sites), default=0)


def _choosing(chunk: SiteChunk) -> int:
    """Bytes that choosing a chunk's lambda takes: up to three trials of some experts go through what solving takes,
    together, beside the chunk's weight."""
    count, one = chunk.stop - chunk.first, 4 * chunk.site.in_features**2
    sample = min(count, EXPERTS) * one
    weight = 4 * count * chunk.site.in_features * chunk.site.rows
    return weight + 4 * sample + 5 * min(3 * sample, max(sample, TRIAL_BYTES))


def _flow(plan: Plan, members: list[Target]) -> int:
    """Elements that a token leaves in memory on its way through a block."""
    widest = max((max(target.shape) for target in members), default=0)
    return 12 * plan.lazy.hidden_size + 4 * widest * shapes.choices(plan)
