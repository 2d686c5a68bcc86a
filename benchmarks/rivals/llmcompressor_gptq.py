"""The rival: llm-compressor's GPTQModifier on the same model and the same tokens.

In a virtual environment of its own (it pins other versions than we do):

    pip install torch==2.13.0 && pip install llmcompressor==0.14.0.1
    python llmcompressor_gptq.py MODEL TOKENS.safetensors OUT [--bits 4] [--group-size 64]

TOKENS holds int64 [S, L] under the name `tokens`, as `python -m benchmarks.quality.tokens` writes it. Its defaults
otherwise: static activation order, damping 0.01, lm_head left. Prints one JSON line with wall, CPU and peak memory.
"""

import argparse
import json
import resource
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()

    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_file(args.tokens)["tokens"]
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=True, strategy="group", group_size=args.group_size
    )
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        recipe=[recipe],
        dataset=data,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    model.save_pretrained(args.out, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "tool": f"llm-compressor {llmcompressor.__version__}",
                "bits": args.bits,
                "group_size": args.group_size,
                "windows": list(tokens.shape),
                "wall_seconds": round(wall, 1),
                "cpu_seconds": round(cpu, 1),
                "peak_mib": round(peak),
            }
        )
    )


if __name__ == "__main__":
    main()
