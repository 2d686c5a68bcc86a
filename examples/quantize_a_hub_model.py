"""Quantize a model of the Hugging Face hub, say what it cost, and let the result speak.

    python examples/quantize_a_hub_model.py Qwen/Qwen3-0.6B qwen3-w4

Without arguments it takes SmolLM2-135M, which comes in a Python package and needs no hub.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sarqc


def main(model: str = "smollm2", out: str | Path = "smollm2-w4", **settings: Any) -> sarqc.Result:
    """model: hub id, local folder, or `smollm2`. out: folder to write. settings: as `sarqc.quantize` takes them."""
    settings = {"bits": 4, "num_samples": 16, "seqlen": 512} | settings
    result = sarqc.quantize(model, out, **settings)

    print(f"{result.size / 1e6:.0f} MB, {result.bits_per_weight} bits per quantized weight")
    # Both are squared errors of the layers' outputs on the calibration text, relative to the outputs themselves.
    print(f"output error {result.error:.2e}, round-to-nearest {result.rtn_error:.2e}")
    for layer in result.layers:
        if layer.fallback:
            print(f"{layer.name}: {layer.fallback}")

    network, tokenizer = sarqc.load(result.out)  # a transformers model and its tokenizer
    prompt = tokenizer("The most important thing about a library is", return_tensors="pt").to(network.device)
    tokens = network.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return result


if __name__ == "__main__":
    main(*sys.argv[1:3])
