"""The rival: GPTQModel's GPTQ on the same model and the same tokens.

In a virtual environment of its own (it brings its own torch):

    pip install gptqmodel==7.7.0
    python gptqmodel_oneshot.py MODEL TOKENS.safetensors OUT [--bits 4] [--group-size 64]

TOKENS holds int64 [S, L] under the name `tokens`, as `python -m benchmarks.quality.tokens` writes it. Everything else
is as its authors set it. On two cores it starts only with GPTQMODEL_CPU_WORKERS=2 in the environment. Prints one JSON
line with wall and CPU seconds.
"""

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--modifier", choices=("gptq",), default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()

    import gptqmodel
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    tokens = load_file(args.tokens)["tokens"]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, device=device)
    model = GPTQModel.load(args.model, config)
    wall, cpu = time.perf_counter(), time.process_time()
    model.quantize(data, batch_size=1)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    model.save(args.out)
    what = {"tool": f"GPTQModel {gptqmodel.__version__}", "bits": args.bits, "group_size": args.group_size}
    print(json.dumps(what | {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}))


if __name__ == "__main__":
    main()
