"""Which runtimes support a model: one that will be quantized, or a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sarqc.checkpoint.reader import Checkpoint
from sarqc.config import QuantConfig
from sarqc.conventions import star
from sarqc.model import moe
from sarqc.model.candidates import Target
from sarqc.model.layers import targets_of
from sarqc.model.lazy_model import LazyModel
from sarqc.serving.rules import Layer, RuntimeModel, RuntimeSupport, fused_layers, mixed_places, runtime_support


def runtime_model(lazy: LazyModel, quantized: Sequence[Target], left: Sequence[str]) -> RuntimeModel:
    """A model with these layers quantized and those left unquantized."""
    config = lazy.text_config
    heads, key_values = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    linears = [
        (target.linear, target.shape, lazy.model.get_parameter(target.parameter).dim() == 3)
        for target in quantized
        if not target.embedding
    ]
    names = [target.linear for target in quantized]
    partial = _partial_experts(lazy, quantized)
    behind = {target.linear for target in quantized if target.block >= len(lazy.blocks)}
    layers = fused_layers(linears, key_values, behind)
    embeddings = tuple(
        Layer(target.linear, target.shape[:1], target.shape[1], "none", False, embedding=True, count=1)
        for target in quantized
        if target.embedding
    )
    return RuntimeModel((*layers, *embeddings), mixed_places(names, left), partial, heads, key_values)


def _partial_experts(lazy: LazyModel, quantized: Sequence[Target]) -> tuple[str, ...]:
    """Modules of experts, with * for numbers, of which some matrices are quantized and others are not."""
    chosen = Counter(target.module for target in quantized)
    partial: dict[str, None] = {}
    for name, count in chosen.items():
        module = lazy.model.get_submodule(name)
        if moe.is_experts(module):
            whole = sum(len(lazy.slices[f"{name}.{projection}"]) for projection in moe.projections(module))
            partial |= {star(name): None} if count < whole else {}
    return tuple(partial)


def checkpoint_support(checkpoint: Checkpoint, lazy: LazyModel) -> list[RuntimeSupport]:
    """Every runtime with every number of ranks, for a checkpoint as its headers describe it.

    Layers that differ in bits, group size or symmetry are checked separately. Empty where nothing is quantized, or
    where there are no rules for the group size.
    """
    kinds = _kinds(checkpoint)
    if checkpoint.format is None or not all(size == -1 or size >= 8 for _, size, _ in kinds):
        return []
    targets = targets_of(lazy, checkpoint.linears())
    supports = []
    for (bits, group_size, sym), linears in kinds.items():
        quantized = [target for target in targets.selected if target.linear in linears]
        others = [target.linear for target in targets.selected if target.linear not in linears]
        model = runtime_model(lazy, quantized, [*targets.untouched, *others])
        supports.append(runtime_support(model, QuantConfig(bits, group_size, sym), checkpoint.format.name))
    return [_together(ones) for ones in zip(*supports, strict=True)]


def _kinds(checkpoint: Checkpoint) -> dict[tuple[int, int, bool], set[str]]:
    """The quantized Linears of each bits, group size and symmetry."""
    infos = {linear: checkpoint.describe(linear) for linear in checkpoint.linears()}
    channel = all(info.groups == 1 for info in infos.values())
    kinds: dict[tuple[int, int, bool], set[str]] = {}
    for linear, info in infos.items():
        group_size = -1 if channel else info.shape[1] // info.groups
        kinds.setdefault((info.bits, group_size, info.sym), set()).add(linear)
    return kinds


def _together(ones: Sequence[RuntimeSupport]) -> RuntimeSupport:
    """One server with one number of ranks, for layers of several kinds."""
    kernels = sum((Counter(one.kernels) for one in ones), Counter[str]())
    failures = dict.fromkeys(line for one in ones for line in one.failures)
    return replace(ones[0], kernels=dict(kernels), failures=tuple(failures))


@dataclass(frozen=True)
class Server:
    """What one server does with a checkpoint. ranks: numbers of them, of `RANKS`, that it runs on, with the kernels of
    the first. failure: the first number that it does not run on, and why; (0, "") where it runs on all. known: whether
    there are rules for it."""

    name: str
    ranks: tuple[int, ...]
    kernels: dict[str, int]
    failure: tuple[int, str]
    known: bool

    def __str__(self) -> str:
        """One line."""
        if not self.known:
            return f"{self.name}: not known for this format"
        ranks, reason = self.failure
        if not self.ranks:
            return f"{self.name}: not supported: {reason}"
        kernels = ", ".join(f"{kernel} {count}" for kernel, count in self.kernels.items())
        why = f"; not at tp {ranks}: {reason}" if reason else ""
        return f"{self.name}: tp {', '.join(map(str, self.ranks))} ({kernels}){why}"


def by_runtime(outlooks: Sequence[RuntimeSupport]) -> list[Server]:
    """Support summed up for each runtime."""
    runtimes = []
    for name in dict.fromkeys(one.server for one in outlooks):
        mine = sorted((one for one in outlooks if one.server == name and one.known), key=lambda one: one.ranks)
        good = [one for one in mine if not one.failures]
        failure = next(((one.ranks, one.failures[0]) for one in mine if one.failures), (0, ""))
        kernels = good[0].kernels if good else {}
        runtimes.append(Server(name, tuple(one.ranks for one in good), kernels, failure, bool(mine)))
    return runtimes


def ranks_by_server(outlooks: Sequence[RuntimeSupport]) -> dict[str, list[int] | None]:
    """Numbers of ranks that each server runs on, none where it refuses; None where there are no rules."""
    return {server.name: list(server.ranks) if server.known else None for server in by_runtime(outlooks)}
