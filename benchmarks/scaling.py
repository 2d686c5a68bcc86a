"""What large models will take on one and on eight GPUs: predictions, from shapes and rates alone.

    python -m benchmarks.scaling

Every term is bytes or flops, counted from the plan of a real run (its sites, its portions under the Gram budget, its
sharing out over ranks), over a rate that is written down in `H200`. Nothing here is measured on that machine.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from sarqc.config import Configs
from sarqc.estimation import shapes
from sarqc.estimation.seconds import FOLDS, TRIED, busiest, measured_share, visits
from sarqc.estimation.sizes import sizes
from sarqc.method.error_correction import SHARE_ROWS
from sarqc.method.lambda_search import EXPERTS
from sarqc.model.sites import Site
from sarqc.pipeline.activation_memory import DEVICE_SHARE, suspended_bytes
from sarqc.pipeline.plan import Plan, make_plan
from sarqc.pipeline.resume import STATES_SHARE

WINDOWS, SEQLEN = 128, 2048


@dataclass(frozen=True)
class Rates:
    """Of one rank, but for disk, which all ranks of a machine share; what is reached of a published figure is in it.

    forward, gram, cross, factor, product, descent: flop/s of forward passes, Grams, cross Grams, Cholesky factors,
    products in fp32 and passes over codes and scales. columns: seconds of a column, search for its grid included, of up
    to `AT_ONCE` rows. disk, pcie, network: bytes/s. room: bytes of memory.
    """

    forward: float
    gram: float
    cross: float
    factor: float
    product: float
    columns: float
    descent: float
    disk: float
    pcie: float
    network: float
    room: float


H200 = Rates(
    forward=400e12,
    gram=850e12,  # counted: 262,144 rows of 4096 inputs in 10.4 ms, of 14336 in 124 ms
    cross=216e12,  # counted: a million rows of 14336 x 4096 in 0.57 s
    factor=25e12,
    product=45e12,
    columns=0.44e-6,  # counted: 4096 columns in 1.2 ms, and half as much again for what waits
    descent=39e12,  # counted: 3 to 4 ms for 4096 x 4096
    disk=5e9,
    pcie=40e9,
    network=300e9,
    room=141e9,
)
AT_ONCE = 4 * 4096
"""Rows whose columns are quantized side by side: a warp for each 32 on each of four schedulers."""

TRIANGLE = 9 / 16
"""Of a Gram or a factor, what is sent: 8 strips of rows, each as far as its lower triangle reaches."""

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
    """Seconds of a run by what takes them. kept: whether suspended micro-batches fit beside a block."""

    seconds: dict[str, float]
    kept: bool

    @property
    def total(self) -> float:
        """Of the whole run, nothing overlapping."""
        return sum(self.seconds.values())


def plan_of(config: PreTrainedConfig) -> Plan:
    """The plan of a run of the default method over a model of which there is a configuration."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return make_plan(Path(folder), Configs.of(device="cpu", dtype="bfloat16"), headers_only=True)


def predict(plan: Plan, ranks: int, rates: Rates, *, windows: int = WINDOWS, seqlen: int = SEQLEN) -> Prediction:
    """Seconds on `ranks` ranks of one machine, with sites as names suggest that a forward joins them."""
    spent = dict.fromkeys(("read", "store", "pcie", "forward", "gram", "solve", "lambda", "descent", "network"), 0.0)
    tokens = windows * seqlen / ranks
    hidden = shapes.states_bytes(plan, windows, seqlen)
    blocks = [shapes.merged_sites(sites) for _, sites in shapes.blocks(plan)]
    for sites in blocks:
        weights = sum(site.experts * site.rows * site.in_features for site in sites)
        spent["read"] += 2 * weights / rates.disk
        spent["pcie"] += (2 * weights + hidden / ranks) / rates.pcie
        streams = 1 + plan.method.error_correction
        spent["forward"] += streams * sum(_pass(plan, site, tokens) for site in sites) / rates.forward
        summed = handed_on = 0.0
        for site in sites:
            spent["gram"] += 2.0 * tokens * visits(plan, site) * site.in_features**2 / rates.gram
            summed += TRIANGLE * site.experts * site.in_features**2
            dense = site.experts == 1
            share = 1 / ranks if dense else busiest(site, ranks, torch.device("cuda"), gram=True)
            factors = 1.0 if dense else share * site.experts  # ranks that share rows all make the factor
            spent["solve"] += factors * _factor(site) / rates.factor + share * site.experts * _columns(site, rates)
            products = 2.0 * site.experts * site.rows * site.in_features**2
            spent["descent"] += share * plan.method.cd_passes * products / rates.descent
            tried = math.ceil(TRIED * min(site.experts, EXPERTS) / ranks) * measured_share(len(blocks))
            spent["lambda"] += tried * (_factor(site) / rates.factor + site.in_features * rates.columns)
            if site.residual_write:
                handed = _pass(plan, site, tokens)
                spent["gram"] += handed / rates.cross
                spent["forward"] += handed / rates.forward
                spent["solve"] += _shifts(site, ranks, rates)
                summed += site.rows * site.in_features
                handed_on += 2 * TRIANGLE * site.in_features**2
        spent["network"] += (
            4 * FOLDS * summed * 2 * (ranks - 1) / ranks + (weights + hidden + 4 * handed_on) * (ranks > 1)
        ) / rates.network
    size = sizes(plan, windows, seqlen)
    spent["store"] += 2 * size.output / rates.disk
    spent["store"] += min(len(blocks) * hidden / rates.disk, STATES_SHARE * sum(spent.values()))
    room = DEVICE_SHARE * (rates.room - 2 * max(_elements(sites) for sites in blocks))
    return Prediction(spent, suspended_bytes(plan, int(tokens)) <= room)


def _pass(plan: Plan, site: Site, tokens: float) -> float:
    """Flops of a forward through a site."""
    return 2.0 * tokens * visits(plan, site) * site.rows * site.in_features


def _columns(site: Site, rates: Rates) -> float:
    """Seconds of a matrix beside its factor: its columns, and the products between panels."""
    rows, width = site.rows, site.in_features
    return width * math.ceil(rows / AT_ONCE) * rates.columns + rows * width**2 / rates.product


def _shifts(site: Site, ranks: int, rates: Rates) -> float:
    """Seconds of the shift of each fold, with what it does on the other, and of all, by rows. Ranks deal the factors,
    the solver's among them, which is counted already."""
    factor, solves = _factor(site) / rates.factor, 2.0 * site.rows * site.in_features**2 / rates.product
    sampled = solves * min(1.0, SHARE_ROWS / site.rows)  # of a fold, by a sample of rows
    turns = math.ceil((FOLDS + 2) / ranks)
    return (turns - 1) * factor + min(FOLDS, turns) * 2 * sampled + solves / ranks


def _factor(site: Site) -> float:
    return site.in_features**3 / 3


def _elements(sites: list[Site]) -> float:
    return float(sum(site.experts * site.rows * site.in_features for site in sites))


def table() -> str:
    """The predictions as a Markdown table, in minutes."""
    heads = ("model", "GPUs", *predict(_plan(next(iter(MODELS))), 1, H200).seconds, "minutes", "x")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in MODELS:
        plan = _plan(name)
        alone = predict(plan, 1, H200)
        for ranks, result in ((1, alone), (8, predict(plan, 8, H200))):
            cells = [f"{seconds / 60:.1f}" for seconds in result.seconds.values()]
            cells += [f"{result.total / 60:.1f}", f"{alone.total / result.total:.1f}"]
            lines.append("| " + " | ".join([name, str(ranks), *cells]) + " |")
            assert result.kept, f"{name}: micro-batches do not fit, so blocks are recomputed, which is not counted"
    return "\n".join(lines)


def _plan(name: str) -> Plan:
    kind, values = MODELS[name]
    return plan_of(kind(**values, tie_word_embeddings=False))


if __name__ == "__main__":
    print(table())
