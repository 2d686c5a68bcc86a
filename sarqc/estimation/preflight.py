"""Estimate a run: the layers, memory, disk and time, and the runtimes that load the result.

Made before every run; a dry run ends with it. It reads the configuration and the headers, and no weights.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sarqc.checkpoint.assemble import MERGE_BYTES, SHARD_BYTES
from sarqc.checkpoint.formats import NEUTRAL
from sarqc.conventions import star
from sarqc.errors import ResourceError
from sarqc.estimation import shapes
from sarqc.estimation.memory import HostBuffers, Memory, estimate_memory
from sarqc.estimation.seconds import Time, seconds
from sarqc.estimation.sizes import Sizes, bits_per_weight, sizes
from sarqc.pipeline.distributed import world
from sarqc.pipeline.plan import Plan
from sarqc.report.summary import human
from sarqc.serving import rules
from sarqc.serving.compatibility import runtime_model
from sarqc.system import host_memory, ranks_here

_SPARE = 50 << 20
"""Bytes of disk for headers, tokenizer and reports."""


@dataclass(frozen=True)
class LayerSummary:
    """Layers of one name (numbers as *), and why they are left; None for those that are quantized."""

    name: str
    shape: tuple[int, ...]
    count: int
    left: str | None


@dataclass(frozen=True)
class Disk:
    """What a run will write under some paths of one file system, and what is free there; bytes."""

    paths: tuple[str, ...]
    needed: int
    free: int


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model and what it becomes. sites: as shapes tell them; a forward may show that some are one."""

    model: str
    architecture: str
    blocks: int
    sites: int
    quantized_linears: int
    kinds: tuple[LayerSummary, ...]
    bits_per_weight: float
    sizes: Sizes


@dataclass(frozen=True, kw_only=True)
class Preflight(ModelSummary):
    """What is known before the first block. windows, seqlen: (0, 0) for methods without calibration. ranks: processes
    that share the work; memory and what is waiting are those of one of them. problems: why the run cannot begin."""

    windows: int
    seqlen: int
    ranks: int
    device: str
    dtype: str
    memory: tuple[Memory, ...]
    waiting: HostBuffers
    disk: tuple[Disk, ...]
    time: Time
    serve: tuple[rules.RuntimeSupport, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def headline(self) -> str:
        """The run in one line."""
        peak = max(stage.host for stage in self.memory)
        device = max(stage.device for stage in self.memory)
        return (
            f"{self.blocks} blocks, {self.quantized_linears} Linears at {self.bits_per_weight:.2f} bits: "
            f"{human(self.sizes.output)} checkpoint, {human(self.sizes.work)} work folder, about {human(peak)} memory"
            + (f", {human(device)} on {self.device}" if device else "")
            + f" and {_minutes(self.time.total)}"
            + (f" on {self.ranks} ranks" if self.ranks > 1 else "")
        )

    def refuse(self) -> None:
        """`ResourceError` with the first problem, if there is one."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more problems: --dry-run shows them)" if self.problems[1:] else ""
            raise ResourceError(self.problems[0] + more)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = asdict(self)
        values["output_bytes"], values["work_bytes"] = self.sizes.output, self.sizes.work
        values["time"]["total"] = self.time.total
        return values


def estimate_run(plan: Plan, text: Sequence[int] | None, out: Path, work: Path) -> Preflight:
    """The preflight of a plan. text: windows and tokens in each; None where no text is looked at."""
    windows, seqlen = text or (0, 0)
    ranks = world()
    size = sizes(plan, windows, seqlen)
    waiting, stages = estimate_memory(plan, windows, seqlen, ranks)
    disk = tuple(_disk(plan, size, waiting, out, work))
    model, tp = runtime_model(plan.lazy, plan.targets.selected, plan.targets.untouched), plan.quant.tp
    servers = sorted({*rules.RANKS, tp}) if tp else rules.RANKS
    runtime_support = tuple(rules.runtime_support(model, plan.quant, plan.format.name, servers))
    problems = [*_too_little_disk(disk), *_too_little_memory(plan, stages), *_no_server(runtime_support, tp)]
    return Preflight(
        model=plan.model,
        architecture=type(plan.lazy.model).__name__,
        blocks=len(plan.lazy.blocks),
        sites=sum(len(sites) for _, sites in shapes.blocks(plan)),
        quantized_linears=len(plan.targets.selected),
        kinds=tuple(_kinds(plan)),
        windows=windows,
        seqlen=seqlen,
        ranks=ranks,
        device=str(plan.device),
        dtype=str(plan.dtype).removeprefix("torch."),
        bits_per_weight=bits_per_weight(plan, size),
        sizes=size,
        memory=tuple(stages),
        waiting=waiting,
        disk=disk,
        time=seconds(plan, windows, seqlen, ranks),
        serve=runtime_support,
        notes=(*plan.notes, *_nowhere(runtime_support)),
        problems=tuple(problems),
    )


def _kinds(plan: Plan) -> list[LayerSummary]:
    counted: Counter[tuple[str, tuple[int, ...], str | None]] = Counter()
    for target in plan.targets.selected:
        counted[star(target.linear), target.shape, None] += 1
    patterns, left = dict(plan.targets.ignored), dict(plan.targets.left)
    known = set(plan.source.names())
    for name in plan.targets.untouched:
        tensor = next((one for one in (f"{name}.weight", name) if one in known), None)
        outside = "not used by transformers" if name in plan.lazy.unused else "outside the blocks"
        reason = f"ignore {patterns[name]}" if name in patterns else left.get(name, outside)
        counted[star(name), plan.source.shape(tensor) if tensor else (), reason] += 1
    return [LayerSummary(name, shape, count, left) for (name, shape, left), count in counted.items()]


def _disk(plan: Plan, size: Sizes, waiting: HostBuffers, out: Path, work: Path) -> list[Disk]:
    """Needs by file system; what the work folder holds already is counted as free. Ranks of this machine have their
    hidden states beside each other."""
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0
    here = size.work + ranks_here() * waiting.mapped + _SPARE
    places = [_existing(path) for path in (work, out)]
    apart = places[0].stat().st_dev != places[1].stat().st_dev
    disks: dict[int, Disk] = {}
    for path, place, needed, freed in zip(
        (work, out), places, (here, _beside_work(plan, size, apart)), (there, 0), strict=True
    ):
        system = place.stat().st_dev
        before = disks.get(system, Disk((), 0, shutil.disk_usage(place).free))
        disks[system] = Disk((*before.paths, str(path)), before.needed + needed, before.free + freed)
    return list(disks.values())


def _beside_work(plan: Plan, size: Sizes, apart: bool) -> int:
    """Bytes that the output takes beside the shards of the work folder. apart: it is on another file system.

    Shards are renamed. They are copied to another file system and into the one file of a small model, and converted to
    another format by way of a spool as large as a shard.
    """
    if plan.format is not NEUTRAL:
        return size.output + min(size.output, SHARD_BYTES)
    return size.output if apart or size.output <= MERGE_BYTES else 0


def _existing(path: Path) -> Path:
    """The folder itself, or the first above it that is there."""
    return next(one for one in (path.resolve(), *path.resolve().parents) if one.exists())


def _too_little_disk(disk: Sequence[Disk]) -> list[str]:
    return [
        f"{' and '.join(one.paths)} need {human(one.needed)} of disk, {human(one.free)} are free: make room, or "
        "use another --work-dir or output folder"
        for one in disk
        if one.needed > one.free
    ]


def _too_little_memory(plan: Plan, stages: Sequence[Memory]) -> list[str]:
    problems = []
    host = host_memory()
    worst = max(stages, key=lambda stage: stage.host)
    way_out = "lower --gram-budget, --activation-budget, --num-samples or --seqlen"
    here = ranks_here()
    if here * worst.host > host:
        problems.append(
            f"stage {worst.stage} needs about {human(worst.host)} of memory{f' on each of {here} ranks' * (here > 1)}, "
            f"this machine has {human(host)}: {way_out}"
        )
    if plan.device.type == "cuda":
        total = torch.cuda.get_device_properties(plan.device).total_memory
        worst = max(stages, key=lambda stage: stage.device)
        if worst.device > total:
            problems.append(
                f"stage {worst.stage} needs about {human(worst.device)} on {plan.device}, which has {human(total)}: "
                f"{way_out}, or --device cpu"
            )
    return problems


def _no_server(runtime_support: Sequence[rules.RuntimeSupport], tp: int | None) -> list[str]:
    """A layer that no server takes on `tp` ranks; with the line of the first server that refuses it."""
    asked = [one for one in runtime_support if one.ranks == tp and one.known and one.server != rules.EXPANDS]
    if not asked or any(not one.failures for one in asked):
        return []
    return [f"tp = {tp}: {asked[0].server} refuses {asked[0].failures[0]}; choose another group size, format or --tp"]


def _nowhere(runtime_support: Sequence[rules.RuntimeSupport]) -> list[str]:
    """A note where no server loads the result, on any number of ranks."""
    known = [one for one in runtime_support if one.known and one.server != rules.EXPANDS]
    if not known or any(not one.failures for one in known):
        return []
    return [f"no server is known to load the result: {known[0].failures[0]}"]


def _minutes(spent: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if spent >= 2 * length:
            return f"{spent / length:.1f} {unit}"
    return f"{max(spent, 1):.0f} s"
