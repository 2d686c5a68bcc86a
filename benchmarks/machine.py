"""What a number was measured on, and what that machine can do: facts for every record, and the measured roof."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.base import Roof
from benchmarks.timing import in_turns, percentiles, ready
from sarqc.system import resolve_device, versions

ROOT = Path(__file__).parent.parent
QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def device_of(name: str) -> torch.device:
    """The device of a `--device`, made the current one: events and graphs are of that, whatever they time."""
    device = resolve_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def facts(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """GPU (or CPU) by name, driver, clocks where nvidia-smi tells them, versions, commit, time in UTC."""
    known: dict[str, Any] = {"gpu": None, "driver": None, "clocks": None}
    if device.type == "cuda":
        known |= _card(device.index or 0)
    return {
        "device": device.type,
        **known,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "commit": commit or os.environ.get("SARQC_COMMIT") or _commit(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def measure_roof(device: torch.device, quick: bool) -> Roof:
    """Bytes a second of a copy (read and written both counted) and flops of a large product, medians of some turns.

    On a card the product is bf16, 8192 on each side, of random numbers; on a CPU it is what `torch.mm` does in fp32.
    """
    on_card = device.type == "cuda"
    count = 1 << (30 if on_card and not quick else 24)
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    side, dtype = (8192, torch.bfloat16) if on_card else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    turns = {
        "copy": ready([lambda: target.copy_(source)], device),
        "product": ready([lambda: torch.mm(a, b, out=product)], device),
    }
    in_turns(turns, 0.2 if quick else 1.0)
    seconds = {name: percentiles(turn.samples)["p50"] for name, turn in turns.items()}
    return Roof(2 * source.numel() * source.element_size() / seconds["copy"], 2 * side**3 / seconds["product"])


def file_name(device: torch.device) -> str:
    """A GPU's name as a file's: "nvidia-h200"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def place(device: torch.device, quick: bool) -> Path:
    """Committed results are of cards and of whole runs; everything else is a file that goes away."""
    if device.type == "cuda" and not quick:
        return ROOT / "benchmarks" / "results" / f"{file_name(device)}.jsonl"
    with tempfile.NamedTemporaryFile(prefix="sarqc-bench-", suffix=".jsonl", delete=False) as file:
        return Path(file.name)


def _card(index: int) -> dict[str, Any]:
    card: dict[str, Any] = {"gpu": torch.cuda.get_device_name(index)}
    if shutil.which("nvidia-smi") is None:
        return card
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    cells = [cell.strip() for cell in done.stdout.split(",")]
    if done.returncode or len(cells) != len(QUERY):
        return card
    reported = dict(zip(QUERY, cells))
    return card | {"driver": reported["driver_version"], "clocks": {name: reported[name] for name in QUERY[2:]}}


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    if shutil.which("git") is None or not (head := git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
