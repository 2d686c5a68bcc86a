"""What this machine can do: versions, devices, which implementation of each operation runs and why others do not.

Every implementation says whether it supports a small call of its operation, with the reason that `quantize` would get.
Those that do compute it, and the result is compared with the definition in float64. Takes seconds; on a GPU the first
time longer, as kernels are compiled.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sarqc.errors import SarqcError
from sarqc.system import installed, versions
from sarqc_kernels import build, selftest
from sarqc_kernels.backend import ENVIRONMENT, Implementation, explain
from sarqc_kernels.device import device_info, interpreting


@dataclass(frozen=True)
class OperationCheck:
    """One implementation of one operation on one device.

    case: of the probe, where an operation has several. reason: why it does not run here, or None. chosen: it is the
    one that runs. error: of its self-test, next to `limit`; None where there was none. failed: what went wrong in the
    self-test, or None.
    """

    op: str
    case: str
    device: str
    backend: str
    reason: str | None
    chosen: bool
    error: float | None
    limit: float
    failed: str | None
    seconds: float


def examine() -> dict[str, Any]:
    """Everything that `sarqc doctor` shows, as JSON values; `healthy` is False where a self-test failed."""
    verdicts = [
        verdict for device in devices() for probe in selftest.PROBES for verdict in check_operation(probe, device)
    ]
    found = versions() | packages()
    return {
        "versions": found,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": sys.executable},
        "gpus": gpus(),
        "csrc": csrc(),
        "operations": [asdict(verdict) for verdict in verdicts],
        "environment": {name: os.environ[name] for name in (ENVIRONMENT, "TRITON_INTERPRET") if name in os.environ},
        "free": free(),
        "warnings": warnings(found),
        "healthy": not any(verdict.failed for verdict in verdicts),
    }


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def check_operation(probe: selftest.Probe, device: torch.device) -> list[OperationCheck]:
    """What each implementation of a probe's operation says on a device, and how those that run do."""
    results, chosen_yet = [], False
    implementations = probe.implementations(device)
    known = {implementation.name: implementation for implementation in implementations}
    reasons = dict(explain(probe.op, implementations, probe.arguments(device)))
    forced = os.environ.get(ENVIRONMENT)
    for name in dict.fromkeys([*known, *reasons]):  # in the order in which they are tried
        reason = reasons[name]
        chosen = reason is None and not chosen_yet and forced in (None, "", name)
        chosen_yet |= chosen
        error, failed, seconds = _tested(probe, known[name], device) if reason is None else (None, None, 0.0)
        results.append(OperationCheck(probe.op, probe.case, str(device), name, reason, chosen, error, probe.limit,
                                      failed, seconds))  # fmt: skip
    return results


def _tested(
    probe: selftest.Probe, implementation: Implementation, device: torch.device
) -> tuple[float | None, str | None, float]:
    """Error of the self-test, what failed in it, seconds."""
    began = time.perf_counter()
    try:
        error = probe.error(implementation.name, device)
    except Exception as problem:  # noqa: BLE001  (whatever a compiler of kernels raises is what there is to say)
        message = " ".join(str(problem).split())[:200]
        return None, f"{type(problem).__name__}: {message}", time.perf_counter() - began
    failed = None if error <= probe.limit else f"off by {error:.2g}, allowed is {probe.limit:.2g}"
    return error, failed, time.perf_counter() - began


def packages() -> dict[str, str]:
    """Versions of what is used where it is installed, and of CUDA as torch was built with it."""
    names = ("huggingface_hub", "accelerate", "compressed-tensors", "numpy", "datasets", "gguf", "vllm")
    return installed(names) | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def gpus() -> list[dict[str, Any]]:
    """Name, capability, processors and memory of every GPU; empty where there is none."""
    cards = []
    for device in devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        free_bytes, total = torch.cuda.mem_get_info(device)
        cards.append(
            {
                "device": str(device),
                "name": properties.name,
                "arch": device_info(device).arch,
                "multiprocessors": properties.multi_processor_count,
                "free": free_bytes,
                "memory": total,
            }
        )
    return cards


def csrc() -> dict[str, Any]:
    """State of the CUDA C++ sources: the compiler, the cache, and for each GPU why a library cannot be had."""
    asked = (("cache", build.cache_folder), ("nvcc", build.nvcc), ("sources", build.sources))
    status: dict[str, Any] = {name: _or_reason(ask) for name, ask in asked}
    cuda = [] if interpreting() else devices()[1:]
    status["libraries"] = {
        str(device): build.unsupported_reason("columns", device_info(device).arch, device) or "built" for device in cuda
    }
    return status


def free() -> dict[str, int]:
    """Bytes: memory of the host that can be taken, and disk at the cache and at the current folder."""
    sizes = {"memory": _free_memory()}
    for name, folder in (("cache", build.cache_folder()), ("here", Path.cwd())):
        while not folder.exists():  # the cache may not be there yet; its disk is that of what would hold it
            folder = folder.parent
        sizes[name] = shutil.disk_usage(folder).free
    return sizes


def warnings(found: dict[str, str]) -> list[str]:
    """Pairs of versions that are known to go wrong together, as we saw or as their makers say."""

    def before(name: str, *limit: int) -> bool:
        return name in found and _numbers(found[name]) < limit

    def since(name: str, *limit: int) -> bool:
        return name in found and _numbers(found[name]) >= limit

    rules = (
        (
            interpreting(),
            "TRITON_INTERPRET is set: kernels run in the interpreter, thousands of times slower, and bf16 in tl.dot is "
            "wrong there without the patch of the tests; unset it",
        ),
        (
            interpreting() and before("triton", 3, 7) and since("numpy", 2, 4),
            "triton before 3.7 cannot interpret loops with numpy 2.4 or later: use triton 3.7.1 or numpy below 2.4",
        ),
        (
            since("triton", 3, 8),
            "triton 3.8 and later compile some kernels with spills, which makes them slower, not wrong; 3.6.0 and "
            "3.7.1 compile all without (docs/limits.md)",
        ),
        (
            since("compressed-tensors", 0, 20) and since("transformers", 5, 0),
            "compressed-tensors 0.20 in transformers does not load asymmetric checkpoints as they are written: "
            "use symmetric ones, or vLLM, or sarqc itself",
        ),
        (before("torch", 2, 10), "torch before 2.10 is not supported: upgrade it"),
        (before("transformers", 5, 15), "transformers before 5.15 is not supported: upgrade it"),
    )
    return [text for holds, text in rules if holds]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 7, 1) of "3.7.1+cpu"."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _or_reason(ask: Callable[[], object]) -> str:
    try:
        return str(ask())
    except SarqcError as error:
        return f"not there: {error}"


def _free_memory() -> int:
    """Memory that Linux says can be taken without swapping; elsewhere what is free."""
    try:
        lines: Sequence[str] = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
