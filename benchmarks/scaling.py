"""What large models will take on one and on eight GPUs: predictions, from shapes and rates alone.

    python -m benchmarks.scaling

Every term is bytes or flops, counted from the plan of a real run (its sites, its passes under the Gram budget, its
sharing out over ranks), over a rate that is written down in `H200`. Nothing here is measured on that machine.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from sarqc.config import Configs
from sarqc.estimation import shapes
from sarqc.estimation.sizes import PASSES, PRODUCTS, busiest, sizes
from sarqc.model.sites import Site, SiteChunk
from sarqc.pipeline.grams import portions
from sarqc.pipeline.plan import Plan, make_plan
from sarqc.pipeline.work_split import cost

WINDOWS, SEQLEN = 128, 2048
FOLDS = 2


@dataclass(frozen=True)
class Rates:
    """Of one rank, but for disk, which all ranks of a machine share. Flop/s of forward passes, of Grams, of products in
    fp32 and of solving; bytes/s of memory, disk, PCIe and network; what is reached of the published figure is in it."""

    forward: float
    gram: float
    single: float
    solve: float
    memory: float
    disk: float
    pcie: float
    network: float


H200 = Rates(forward=400e12, gram=300e12, single=45e12, solve=25e12, memory=3e12, disk=5e9, pcie=40e9, network=300e9)

_QWEN = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94,
    num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
)  # fmt: skip
_DEEPSEEK = dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1,
    first_k_dense_replace=3, n_group=8, topk_group=4, q_lora_rank=1536, kv_lora_rank=512,
)  # fmt: skip
_LLAMA = dict(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "Llama-3-70B": (LlamaConfig, _LLAMA),
    "Qwen3-235B-A22B": (Qwen3MoeConfig, _QWEN),
    "DeepSeek-V3": (DeepseekV3Config, _DEEPSEEK),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of a run by what takes them, and how often the text is observed in the block that needs it most."""

    seconds: dict[str, float]
    looks: int

    @property
    def hours(self) -> float:
        """Of the whole run, nothing overlapping."""
        return sum(self.seconds.values()) / 3600


def plan_of(config: PreTrainedConfig) -> Plan:
    """The plan of a run of the default method over a model of which there is a configuration."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return make_plan(Path(folder), Configs.of(device="cpu", dtype="bfloat16"), headers_only=True)


def predict(plan: Plan, ranks: int, rates: Rates, *, windows: int = WINDOWS, seqlen: int = SEQLEN) -> Prediction:
    """Seconds on `ranks` ranks of one machine. Sites are those that shapes tell: where a forward shows that some share
    an input (q, k and v; gate and up), there are fewer Grams than counted here."""
    spent = dict.fromkeys(("disk", "pcie", "forward", "gram", "solve", "grids", "network"), 0.0)
    most = 0
    tokens = windows * seqlen / ranks
    chosen, hidden = shapes.choices(plan), shapes.states_bytes(plan, windows, seqlen)
    for _, sites in shapes.blocks(plan):
        weights = _weights(sites)
        flow = sum(2.0 * tokens * min(site.experts, chosen) * _rows(site) * site.in_features for site in sites)
        grams = sum(site.experts * site.in_features**2 for site in sites)
        parts = [[site for site in sites if not site.residual_write], [site for site in sites if site.residual_write]]
        looks = sum(len(list(portions(part, FOLDS, plan.run.gram_budget))) for part in parts)
        forwards = looks + 2  # the original's, and once more when all is quantized
        most = max(most, looks)
        shares = [busiest(part, ranks, torch.device("cuda"), gram=True) if part else 0.0 for part in parts]
        solved = sum(share * _cost(part) for share, part in zip(shares, parts))
        spent["disk"] += 2 * weights / rates.disk
        spent["pcie"] += (2 * weights + 2 * forwards * hidden / ranks) / rates.pcie
        spent["forward"] += forwards * flow / rates.forward
        spent["gram"] += (
            sum(2.0 * tokens * min(site.experts, chosen) * site.in_features**2 for site in sites) / rates.gram
        )
        for site in (site for site in sites if site.residual_write):
            spent["gram"] += 2.0 * tokens * _rows(site) * site.in_features / rates.single
            solved += (FOLDS + 1) * _cost([site])  # a shift takes about as much as a solve: of each fold, and of all
            grams += _rows(site) * site.in_features
        swept = sum(share * _products(part) for share, part in zip(shares, parts))
        spent["solve"] += solved / rates.solve + plan.method.cd_passes * PRODUCTS * swept / rates.single
        passed = sum(share * _weights(part) for share, part in zip(shares, parts))
        spent["grids"] += passed * PASSES * 4 / rates.memory
        summed = 4 * FOLDS * grams * 2 * (ranks - 1) / ranks
        spent["network"] += (summed + (weights + hidden) * (ranks > 1)) / rates.network
    size = sizes(plan, windows, seqlen)
    spent["disk"] += (2 * size.output + len(plan.lazy.blocks) * hidden) / rates.disk
    return Prediction(spent, most)


def _weights(sites: list[Site]) -> float:
    return sum(site.experts * _rows(site) * site.in_features for site in sites)


def _cost(sites: list[Site]) -> float:
    return 2.0 * sum(cost(SiteChunk(site, 0, site.experts)) for site in sites)


def _products(sites: list[Site]) -> float:
    """Flops of a product of each weight with a matrix of its Gram's size."""
    return sum(2.0 * site.experts * _rows(site) * site.in_features**2 for site in sites)


def _rows(site: Site) -> int:
    return sum(rows for _, _, rows in site.slabs)


def table() -> str:
    """The predictions as a Markdown table."""
    head = ("model", "GPUs", "passes", "disk", "pcie", "forward", "gram", "solve", "grids", "network", "minutes", "x")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, (kind, values) in MODELS.items():
        plan = plan_of(kind(**values, tie_word_embeddings=False))
        alone = predict(plan, 1, H200)
        for ranks, found in ((1, alone), (8, predict(plan, 8, H200))):
            cells = [f"{seconds / 60:.1f}" for seconds in found.seconds.values()]
            gain = f"{alone.hours / found.hours:.1f}"
            lines.append(
                "| " + " | ".join([name, str(ranks), str(found.looks), *cells, f"{60 * found.hours:.0f}", gain]) + " |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
