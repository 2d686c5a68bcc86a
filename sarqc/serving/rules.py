"""Which server runs which layer with which kernel, and on how many ranks: rules as data and small pure functions.

They are what the servers' own sources say, for compressed-tensors `pack-quantized` checkpoints:

    vLLM 0.33           model_executor/kernels/linear/__init__.py (order), quantization/utils/machete_utils.py and
                        marlin_utils.py (shapes), compressed_tensors_moe/*wna16*.py and fused_moe/oracle/int_wna16.py
    SGLang 0.5.23       layers/quantization/compressed_tensors: Marlin from sm_80 on
    transformers 5.23   quantizers/quantizer_compressed_tensors.py: expands the weights when it loads them

Read, not run: a release after these may differ. A quantized head was read in vLLM 0.32 (`ParallelLMHead` in
compressed_tensors.py) and SGLang 0.5.23 (`get_lm_head_scheme` there): both take one that a target of the config names.
So does vLLM an embedding (compressed_tensors_embedding.py), in models whose code hands it the config; not all do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from sarqc.config import QuantConfig
from sarqc.conventions import FUSED, star

RANKS = (1, 2, 4, 8)
VOCABULARY = 64
"""Servers fill up the outputs of a head to a multiple of it."""

SPLIT_INPUTS = {"o_proj", "down_proj", "w2", "out_proj", "c_proj", "dense", "fc2", "dense_4h_to_h", "wo"}
"""Last names of Linears of which each rank has a part of the inputs; of others it has a part of the outputs."""
WHOLE = {"q_a_proj", "kv_a_proj_with_mqa"}
"""Last names of Linears that every rank has whole."""
KEY_VALUE = {"k_proj", "v_proj"}

MARLIN_GROUPS, MACHETE_GROUPS = (-1, 32, 64, 128), (-1, 64, 128)


@dataclass(frozen=True)
class Layer:
    """Layers of one kind. name: with * for numbers. outputs: of each Linear that the server fuses. stacked: experts'
    matrices. heads: key-value heads, where those bound how far all but the first can be split. behind: whether it
    stands behind the blocks, as a head does. embedding: whether tokens look rows up in it. count: how many."""

    name: str
    outputs: tuple[int, ...]
    inputs: int
    split: Literal["inputs", "outputs", "none"]
    stacked: bool
    heads: int | None = None
    behind: bool = False
    embedding: bool = False
    count: int = 0

    def on(self, ranks: int) -> tuple[int, int] | str:
        """(outputs, inputs) of one of `ranks`, or why they cannot be split so."""
        if self.split == "inputs":
            if self.inputs % ranks:
                return f"{self.inputs} inputs cannot be split over {ranks} ranks"
            return sum(self.outputs), self.inputs // ranks
        if self.split == "none":
            return sum(self.outputs), self.inputs
        total = 0
        for index, rows in enumerate(self.outputs):
            rows += -rows % VOCABULARY if self.behind else 0
            parts = min(ranks, self.heads) if self.heads and (index or len(self.outputs) == 1) else ranks
            if rows % parts:
                return f"{rows} outputs cannot be split over {parts} ranks"
            total += rows // parts
        return total, self.inputs


@dataclass(frozen=True)
class RuntimeSupport:
    """What one runtime with `ranks` ranks does with a checkpoint. kernels: layers that run in each kernel. failures: a
    line for each kind of layer that it rejects. known: whether there are rules for this case.
    """

    server: str
    ranks: int
    kernels: dict[str, int]
    failures: tuple[str, ...]
    known: bool = True


Rule = Callable[[Layer, int, int, QuantConfig], tuple[str | None, str]]
"""rule(layer, outputs, inputs of a rank, quant) -> (kernel, "") or (None, reason)."""


def _group(quant: QuantConfig, inputs: int) -> str | None:
    if not quant.divides(inputs):
        return f"{inputs} inputs on each rank are no multiple of the group size {quant.group_size}"
    return None


def _marlin(quant: QuantConfig) -> bool:
    return quant.bits in ((4, 8) if quant.sym else (4,)) and quant.group_size in MARLIN_GROUPS


def _vllm(layer: Layer, outputs: int, inputs: int, quant: QuantConfig, hopper: bool) -> tuple[str | None, str]:
    if layer.embedding:
        return _vllm_embedding(layer, quant)
    if reason := _group(quant, inputs):
        return None, reason
    if layer.stacked:
        return _vllm_experts(layer, outputs, inputs, quant)
    machete = quant.bits in (4, 8) and quant.group_size in MACHETE_GROUPS and not (inputs % 64 or outputs % 128)
    if hopper:
        return ("Machete" if machete else "Humming"), ""
    return ("Marlin" if _marlin(quant) else "Humming"), ""


def _vllm_embedding(layer: Layer, quant: QuantConfig) -> tuple[str | None, str]:
    if not quant.sym:
        return None, "embeddings are read as symmetric, whatever the config says"
    if 32 % quant.bits:
        return None, f"codes of {quant.bits} bits in embeddings are read in another layout: --embedding-bits 2, 4 or 8"
    return "lookup", ""


def _vllm_experts(layer: Layer, outputs: int, inputs: int, quant: QuantConfig) -> tuple[str | None, str]:
    if inputs * quant.bits % 32:
        return None, f"{inputs} inputs of {quant.bits} bits on each rank fill no whole 32-bit words"
    if not quant.sym and outputs * quant.bits % 32:
        return None, f"zeros of {outputs} outputs of {quant.bits} bits on each rank fill no whole 32-bit words"
    hidden = inputs if layer.split == "outputs" else outputs
    if _marlin(quant) and hidden % 128 == 0:
        return "Marlin MoE", ""
    if quant.group_size == -1:
        return None, (
            "experts with one scale a row run in Marlin alone (4 bits, or 8 symmetric, hidden size a multiple of 128)"
        )
    return "Humming MoE", ""


def _sglang(layer: Layer, outputs: int, inputs: int, quant: QuantConfig) -> tuple[str | None, str]:
    if layer.embedding:
        return None, "embeddings stay in 16 bits: leave them out of --include"
    if not _marlin(quant):
        kind = "symmetric" if quant.sym else "asymmetric"
        groups = "with one scale a row" if quant.group_size == -1 else f"in groups of {quant.group_size}"
        return None, (
            f"no kernel supports {quant.bits} bits {kind} {groups} "
            "(supported: 4 bits, and 8 symmetric, in groups of 32, 64, 128 or whole rows)"
        )
    if reason := _group(quant, inputs):
        return None, reason
    if layer.stacked and (inputs if layer.split == "outputs" else outputs) % 128:
        return None, "Marlin's experts need a hidden size that is a multiple of 128"
    return ("Marlin MoE" if layer.stacked else "Marlin"), ""


def _transformers(layer: Layer, outputs: int, inputs: int, quant: QuantConfig) -> tuple[str | None, str]:
    if layer.embedding:
        return None, "a model with packed embeddings loads with `import sarqc` alone: its code expects a dense weight"
    if not quant.sym:
        return None, "asymmetric weights load with `import sarqc` alone: it expects zero points in another shape"
    return "expanded on loading", ""


SERVERS: dict[str, Rule] = {
    "vLLM 0.33, sm_80": partial(_vllm, hopper=False),
    "vLLM 0.33, sm_90": partial(_vllm, hopper=True),
    "SGLang 0.5.23": _sglang,
    "transformers 5.23": _transformers,
}
FORMAT = "compressed-tensors"
EXPANDS = "transformers 5.23"
"""The one that expands weights; how it splits them over ranks is not in these rules."""


@dataclass(frozen=True)
class RuntimeModel:
    """A quantized model as a runtime loads it. mixed: places where only a part of a fused matrix is quantized. partial:
    layers of experts of which only some matrices are, or not all alike. heads, key_values: attention heads, where the
    configuration has them.
    """

    layers: tuple[Layer, ...]
    mixed: tuple[str, ...]
    partial: tuple[str, ...]
    heads: int | None
    key_values: int | None


def runtime_support(
    model: RuntimeModel, quant: QuantConfig, format: str, ranks: Sequence[int] = RANKS
) -> list[RuntimeSupport]:
    """Every runtime with every number of ranks; for a format without rules nothing is known."""
    return [_one(server, count, model, quant, format) for server in SERVERS for count in ranks]


def _one(server: str, ranks: int, model: RuntimeModel, quant: QuantConfig, format: str) -> RuntimeSupport:
    if format != FORMAT or (server == EXPANDS and ranks > 1):
        return RuntimeSupport(server, ranks, {}, (), known=False)
    kernels: dict[str, int] = {}
    failures = [f"{name}: all its experts must be quantized alike, or none" for name in model.partial]
    if server != EXPANDS:
        failures += [f"{name}: only a part of what is fused here is quantized" for name in model.mixed]
        if model.heads and model.heads % ranks:
            failures.append(f"{model.heads} attention heads cannot be split over {ranks} ranks")
        elif model.key_values and model.key_values % ranks and ranks % model.key_values:
            failures.append(f"{model.key_values} key-value heads cannot be shared by {ranks} ranks")
    for layer in model.layers:
        kernel, reason = _kernel(server, layer, ranks, quant)
        if kernel is None:
            failures.append(f"{layer.name}: {reason}")
        else:
            kernels[kernel] = kernels.get(kernel, 0) + layer.count
    return RuntimeSupport(server, ranks, kernels, tuple(failures))


def _kernel(server: str, layer: Layer, ranks: int, quant: QuantConfig) -> tuple[str | None, str]:
    """The kernel a layer runs in, or why there is none; that of each width it may get, where layers differ."""
    shape = layer.on(ranks)
    if isinstance(shape, str):
        return None, shape
    kernels: dict[str, None] = {}
    quant = quant.of(layer.embedding)
    for bits in quant.bit_options or (quant.bits,):
        if layer.behind and not quant.sym and server != EXPANDS and sum(layer.outputs) * bits % 32:
            return None, f"zeros of {sum(layer.outputs)} outputs of {bits} bits fill no whole 32-bit words"
        kernel, reason = SERVERS[server](layer, *shape, quant.at(bits))
        if kernel is None:
            return None, reason
        kernels[kernel] = None
    return " or ".join(kernels), ""


def fused_layers(
    linears: Sequence[tuple[str, tuple[int, int], bool]], key_values: int | None, behind: Collection[str] = ()
) -> tuple[Layer, ...]:
    """Quantized Linears (name, (out, in), whether one of many experts) as the servers hold them, kinds counted. behind:
    names of those behind the blocks."""
    merged: dict[tuple[str, tuple[str, ...]], list[tuple[str, tuple[int, int], bool]]] = {}
    for name, shape, stacked in linears:
        parent, _, leaf = name.rpartition(".")
        family = next((names for names in FUSED if leaf in names), (leaf,))
        merged.setdefault((parent, family), []).append((leaf, shape, stacked))
    kinds: dict[Layer, int] = {}
    for (parent, _), members in merged.items():
        leaves = [leaf for leaf, _, _ in members]
        layer = Layer(
            name=star(f"{parent}.{'+'.join(leaves)}".removeprefix(".")),
            outputs=tuple(rows for _, (rows, _), _ in members),
            inputs=members[0][1][1],
            split="inputs" if leaves[0] in SPLIT_INPUTS else "none" if leaves[0] in WHOLE else "outputs",
            stacked=members[0][2],
            heads=key_values if KEY_VALUE & set(leaves) else None,
            behind=f"{parent}.{leaves[0]}".removeprefix(".") in behind,
        )
        kinds[layer] = kinds.get(layer, 0) + len(members)
    return tuple(replace(layer, count=count) for layer, count in kinds.items())


def mixed_places(quantized: Sequence[str], left: Sequence[str]) -> tuple[str, ...]:
    """Places, with * for numbers, where one of `FUSED` is quantized and another is left."""
    chosen = set(quantized)
    seen: dict[str, None] = {}
    for name in left:
        parent, _, leaf = name.rpartition(".")
        for family in FUSED:
            if leaf in family and any(f"{parent}.{other}" in chosen for other in family):
                seen[star(f"{parent}.{'+'.join(family)}")] = None
    return tuple(seen)
