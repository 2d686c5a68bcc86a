"""A packed model beside its bf16 form on this machine: decode, prefill and memory, in turns within one run.

    python -m benchmarks.inference CHECKPOINT benchmarks/results/cpu-inference.json [--rounds 7]

CHECKPOINT is a quantized one (SmolLM2 at W4 g64 takes two or three minutes). Its dense form is the same checkpoint with
the weights expanded to bf16, so that both do the same work. In every round each step is done by both, one right after
the other, the first of them by turns; a ratio is the median over rounds of the ratio within a round, so that whatever
else the machine does falls on both. Rates are tokens per second of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sarqc
from benchmarks.serve.vllm_generate import processor
from sarqc.model.dataset import builtin_text
from sarqc.model.generate import cache_name
from sarqc.model.packed_linear import PackedWeight
from sarqc.system import versions

DECODE_TOKENS, DECODE_AFTER = 24, 16
PREFILLS = (32, 128, 512)
Step = Callable[[Any, Tensor], float]


@torch.inference_mode()
def decode(model: Any, ids: Tensor) -> float:
    """Tokens per second, one after the other, after a short prompt that is not timed."""
    out = model(ids[:, :DECODE_AFTER], use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    name = cache_name(model)
    began = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        out = model(token, use_cache=True, **{name: out[name]})
        token = out.logits[:, -1:].argmax(-1)
    return DECODE_TOKENS / (time.perf_counter() - began)


def prefill(tokens: int) -> Step:
    """Tokens per second of reading a prompt of `tokens`; logits of the last one alone."""

    @torch.inference_mode()
    def step(model: Any, ids: Tensor) -> float:
        began = time.perf_counter()
        model(ids[:, :tokens], use_cache=True, logits_to_keep=1)
        return tokens / (time.perf_counter() - began)

    return step


def stored(model: torch.nn.Module, of: type[torch.nn.Module] | tuple[type[torch.nn.Module], ...] | None = None) -> int:
    """Bytes of the parameters and buffers of a model, or of its modules of a kind; what is shared counts once."""
    modules = [module for module in model.modules() if of is None or isinstance(module, of)]
    every = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in every}.values())


def measure(models: dict[str, Any], ids: Tensor, rounds: int) -> dict[str, Any]:
    """Median rate of each step by each model, and the median over rounds of packed / dense."""
    steps: dict[str, Step] = {"decode": decode} | {f"prefill {tokens}": prefill(tokens) for tokens in PREFILLS}
    rates: dict[str, dict[str, list[float]]] = {step: {name: [] for name in models} for step in steps}
    for model in models.values():  # the first call of each allocates and sets up
        decode(model, ids)
    for turn in range(rounds):
        order = list(models)[:: -1 if turn % 2 else 1]
        for step, run in steps.items():
            for name in order:
                rates[step][name].append(run(models[name], ids))
        print(
            {step: round(result["packed"][-1] / result["dense"][-1], 2) for step, result in rates.items()}, flush=True
        )
    return {
        step: {name: round(statistics.median(result[name]), 2) for name in models}
        | {"ratio": round(statistics.median(p / d for p, d in zip(result["packed"], result["dense"])), 3)}
        | {"ratios": [round(p / d, 3) for p, d in zip(result["packed"], result["dense"])]}
        for step, result in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    dense, tokenizer = sarqc.load(args.checkpoint, dtype="bfloat16", packed=False)
    packed, _ = sarqc.load(args.checkpoint, dtype="bfloat16")
    modules = [module for module in packed.modules() if isinstance(module, PackedWeight)]
    if not modules:
        raise SystemExit(f"{args.checkpoint} is not quantized: nothing of it is packed")
    ids = tokenizer(builtin_text("evaluation")[:8000], return_tensors="pt").input_ids.to(packed.device)
    if ids.shape[1] < max(PREFILLS):
        raise SystemExit(f"the text has {ids.shape[1]} tokens, and {max(PREFILLS)} are read")
    models = {"dense": dense, "packed": packed}
    weights = sum(module.words.shape[0] * module.out_features * module.in_features for module in modules)
    linears = {"dense": 2 * weights, "packed": stored(packed, PackedWeight)}
    memory = {name: stored(model) for name, model in models.items()}
    record = {
        "checkpoint": Path(args.checkpoint).name,
        "bits": sorted({module.bits for module in modules}),
        "group_size": sorted({module.group_size for module in modules}),
        "layouts": sorted({module.layout for module in modules}),
        "steps": measure(models, ids, args.rounds),
        "bytes": memory | {"ratio": round(memory["packed"] / memory["dense"], 4)},
        "bytes of quantized layers": linears | {"ratio": round(linears["packed"] / linears["dense"], 4)},
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "processor": processor()},
        "device": str(packed.device),
        "versions": versions(),
        "rounds": args.rounds,
    }
    args.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
