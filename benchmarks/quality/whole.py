"""Whole runs side by side: ours and those of other tools, on the same tokens and judged by the same code.

    python -m benchmarks.quality.whole MODEL RESULTS.json --dataset TEXT --eval A.txt --eval B.txt --work-dir WORK \
        --format 3:64 --format 2:32 --windows 4,16,64 --method sarqc-gptq --method sarqc \
        --rival gptq=VENV/bin/python --rival awq=VENV/bin/python

A format is BITS:GROUP_SIZE. Every method makes a checkpoint for each format, calibration size and seed from the windows
that are drawn with that seed; checkpoints stay in WORK, so that an interrupted table goes on where it was. The rivals
are those of `benchmarks/rivals/*_oneshot.py`, each run by the interpreter of a virtual environment of its own.
All are judged by `sarqc.compare`, beside RTN; --kept judges what is in WORK and makes nothing.
RESULTS.json gets rows, protocol and versions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import sarqc
from benchmarks.quality.proof import WHOLE, write_results
from sarqc.comparison.experiment import Other
from sarqc.model.calibration_data import windows as windows_of
from sarqc.model.hub import locate
from sarqc.model.tokenizer import load_tokenizer

SEQLEN = 512
RIVALS = {
    "gptq": ("llm-compressor gptq", "llmcompressor_oneshot.py", "gptq"),
    "awq": ("llm-compressor awq", "llmcompressor_oneshot.py", "awq"),
    "autoround": ("AutoRound", "llmcompressor_oneshot.py", "autoround"),
    "gptqmodel": ("GPTQModel", "gptqmodel_oneshot.py", "gptq"),
}
"""Other tools by the name they are asked for with: their name in the table, script, and what the script is to do."""


def tokens_of(args: argparse.Namespace, windows: int, seed: int) -> Path:
    """A file with the windows int64 [S, L] that all methods calibrate on with this seed."""
    path: Path = args.work_dir / f"tokens-{windows}-{seed}.safetensors"
    if not path.exists():
        text = windows_of(args.dataset, lambda: load_tokenizer(locate(args.model)), SEQLEN)
        save_file({"tokens": text.draw(windows, seed).tokens}, path)
    return path


def ours(args: argparse.Namespace, method: str, bits: int, group_size: int, tokens: Path, out: Path) -> str:
    """A checkpoint by one of our methods; what made it."""
    drawn = load_file(tokens)["tokens"]
    how = dict(method=method, bits=bits, group_size=group_size)
    sarqc.quantize(args.model, out, dataset=drawn, num_samples=len(drawn), overwrite=True, **how)
    return f"sarqc {sarqc.__version__}"


def rivals(args: argparse.Namespace, rival: str, bits: int, group_size: int, tokens: Path, out: Path) -> str:
    """The same by another tool, NAME=PYTHON, which prints what it is."""
    name, _, python = rival.partition("=")
    _, script, modifier = RIVALS[name]
    program = Path(__file__).parent.parent / "rivals" / script
    what = [str(locate(args.model)), str(tokens), str(out), "--modifier", modifier]
    format_ = ["--bits", str(bits), "--group-size", str(group_size)]
    done = subprocess.run([python, str(program), *what, *format_], check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout.splitlines()[-1])["tool"])


def _rival(argument: str) -> str:
    name, _, python = argument.partition("=")
    if name not in RIVALS or not python:
        raise argparse.ArgumentTypeError(f"{argument!r}: write NAME=PYTHON, NAME one of {', '.join(RIVALS)}")
    return argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval", action="append", dest="texts", required=True)
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--format", action="append", dest="formats", required=True, help="BITS:GROUP_SIZE")
    parser.add_argument("--method", action="append", dest="methods", default=[])
    parser.add_argument(
        "--rival", action="append", dest="rivals", default=[], type=_rival, help="NAME=PYTHON of its environment"
    )
    parser.add_argument("--also", action="append", default=[], type=Other.parsed, help="as in `sarqc compare --also`")
    parser.add_argument("--windows", default="16", help="calibration sizes, with commas between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--kept", action="store_true", help="make no checkpoint that is not there")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    makers = [(name, name, ours) for name in args.methods]
    makers += [(RIVALS[rival.partition("=")[0]][0], rival, rivals) for rival in args.rivals]
    tools: dict[str, str] = {}
    cells: list[dict[str, Any]] = []
    protocol: dict[str, Any] = {}
    sizes = sorted(map(int, args.windows.split(",")))
    for bits, group_size in (map(int, format_.split(":")) for format_ in args.formats):
        also = [other for other in args.also if (other.bits, other.group_size) == (bits, group_size)]
        for windows, seed, (name, method, make) in product(sizes, map(int, args.seeds.split(",")), makers):
            out = args.work_dir / f"{name.replace(' ', '-')}-{bits}-{group_size}-{windows}-{seed}"
            maker = args.work_dir / f"{out.name}.txt"  # there once the checkpoint is whole
            if not maker.exists():
                if args.kept:
                    continue
                maker.write_text(make(args, method, bits, group_size, tokens_of(args, windows, seed), out))
                print(out.name, flush=True)
            tools[name] = maker.read_text()
            also.append(Other(name, bits, group_size, windows, seed, out))
        comparison = sarqc.compare(
            args.model,
            args.work_dir / "judged",
            methods=("rtn",),
            bits=(bits,),
            group_sizes=(group_size,),
            dataset=args.dataset,
            num_samples=tuple(sizes),
            seqlen=SEQLEN,
            eval_seqlen=SEQLEN,
            texts=args.texts,
            eval_windows=args.eval_windows,
            also=also,
        )
        cells += comparison.table["cells"]
        protocol = comparison.table["protocol"]
    write_results(args.results, protocol | {"mode": WHOLE, "tools": tools}, cells)


if __name__ == "__main__":
    main()
