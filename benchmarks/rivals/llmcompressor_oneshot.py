"""The rival: llm-compressor's GPTQ, AWQ or AutoRound on the same model and the same tokens.

In a virtual environment of its own (it pins other versions than we do):

    pip install torch==2.13.0 && pip install llmcompressor==0.14.0.1 auto-round==0.15.1
    python llmcompressor_oneshot.py MODEL TOKENS.safetensors OUT [--modifier gptq] [--bits 4] [--group-size 64]

TOKENS holds int64 [S, L] under the name `tokens`, as `python -m benchmarks.quality.tokens` writes it. Everything else
is as its authors set it: GPTQ with static activation order and damping 0.01; AWQ with 20 grid points and duo scaling
tried both ways, which costs it time and serves it best; AutoRound with 200 steps a block. lm_head is left. The model is
loaded as it is stored; a CPU without bf16 products takes 4.6 times as long for it as with --dtype float32. Where
there is no GPU its AWQ fails in pinning memory for one; that step changes no number and is left out. It saves Mixtral's
experts under other names than the model's; they get their own. Prints one JSON line with wall, CPU and peak memory.
"""

import argparse
import json
import re
import resource
import time
from pathlib import Path

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What llm-compressor calls an expert's matrices in a Mixtral, and what the model calls them."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--modifier", choices=("gptq", "awq", "autoround"), default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto")
    args = parser.parse_args()

    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    tokens = load_file(args.tokens)["tokens"]
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        recipe=recipe(args.modifier, args.bits, args.group_size),
        dataset=data,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    model.save_pretrained(args.out, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    name_experts(Path(args.out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "tool": f"llm-compressor {llmcompressor.__version__}",
                "modifier": args.modifier,
                "bits": args.bits,
                "group_size": args.group_size,
                "dtype": str(model.dtype),
                "windows": list(tokens.shape),
                "wall_seconds": round(wall, 1),
                "cpu_seconds": round(cpu, 1),
                "peak_mib": round(peak),
            }
        )
    )


def name_experts(folder: Path) -> None:
    """Give a Mixtral's experts their own names in every file of a checkpoint; others stay as they are."""
    from safetensors.torch import load_file, save_file

    def own(name: str) -> str:
        return re.sub(r"(block_sparse_moe\.experts\.\d+\.)(\w+_proj)", lambda m: m[1] + MIXTRAL[m[2]], name)

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if any(own(name) != name for name in tensors):
            save_file({own(name): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"] = {own(name): file for name, file in listed["weight_map"].items()}
        index.write_text(json.dumps(listed))


def recipe(modifier: str, bits: int, group_size: int) -> list[object]:
    """Its modifiers for symmetric weights in groups."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    what = {"config_groups": scheme, "ignore": ["lm_head"]}
    if modifier == "gptq":
        return [GPTQModifier(**what)]
    if modifier == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**what)]
    return [AutoRoundModifier(**what, enable_torch_compile=False)]


if __name__ == "__main__":
    main()
