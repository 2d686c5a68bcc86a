"""A mixture of experts in which some experts saw no token: what happens to them, and where the report says so.

    python examples/starved_experts.py

The model is tiny and random; its routers are made to pass over the first four of sixteen experts (now and then a token
finds one all the same). Nothing is special about those: every expert borrows some rows from the average input of its
layer, and one without rows of its own has that average alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import sarqc

EXPERTS, STARVED = 16, 4


def random_mixture(folder: Path) -> Path:
    """Two blocks of 16 experts, two of which see each token, with routers that pass over the first four."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for block in model.model.layers:
        block.mlp.gate.weight.data[:STARVED] = 0  # a logit of 0, which two of the twelve others beat
    model.save_pretrained(folder)
    return folder


def main(folder: str | Path = "starved") -> sarqc.Result:
    """Make the model in `folder`/model, quantize it to `folder`/w4 and show what the report says of its experts."""
    model = random_mixture(Path(folder) / "model")
    tokens = torch.randint(0, 512, (16, 64), generator=torch.Generator().manual_seed(1))
    result = sarqc.quantize(model, Path(folder) / "w4", bits=4, group_size=32, dataset=tokens)

    print(f"{'site':<48} {'rows per expert':>16} {'without':>8} {'error':>9} {'rounding':>9}")
    for layer in result.layers:
        if len(layer.rows) > 1:  # experts; a dense layer is one expert that sees every row
            span = f"{min(layer.rows)} .. {max(layer.rows)}"
            errors = f"{layer.error:>9.2e} {layer.rtn_error:>9.2e}"
            print(f"{layer.name:<48} {span:>16} {layer.rows.count(0):>8} {errors}")
    borrowed = {site["prior_rows"] for site in result.report["sites"] if len(site["rows"]) > 1}
    print(f"rows that each expert borrows from its layer: {', '.join(map(str, sorted(borrowed)))}")
    print("quantized by RTN instead of solved:", result.report["fallbacks"] or "none")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
