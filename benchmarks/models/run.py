"""One row after the other, each stage in a process of its own, so that what one does to transformers stays there."""

from __future__ import annotations

import json
import multiprocessing
import platform
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

from benchmarks.models.build import build
from benchmarks.models.conditions import CONDITION
from benchmarks.models.dry import READINGS, compared, kind_of

TIMEOUT = 1800
"""Seconds of a stage: seconds of work, and long waits on a busy machine."""
SETTINGS = {"bits": 4, "group_size": 32, "num_samples": 4, "seqlen": 32}
OPTIONAL = ("timm", "scipy")
"""Packages that a few classes import and that this project does not install."""
UNCOUNTED = "choose|router|keeps it in fp32|is no Linear and has fewer|text does not pass"
"""Reasons to leave a matrix that is not one of the decoder's Linears, or that servers keep in 16 bits."""


def sweep(wanted: list[str], out: Path, method: str, *, again: bool) -> None:
    """Run rows and keep each result in `out` as it comes."""
    kept = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    kept |= {"versions": _versions(), "settings": SETTINGS | {"method": method or "the default"}}
    for number, row in enumerate(wanted):
        if row in kept["rows"] and not again:
            continue
        with tempfile.TemporaryDirectory(prefix="sarqc-models-") as place:
            actual = kept["rows"][row] = one(row, Path(place), method)
        out.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{number + 1}/{len(wanted)} {row}: {summary_line(actual)}", flush=True)


def dry(wanted: list[str], out: Path) -> None:
    """Build rows and compare dry runs with what `out` has of their runs."""
    kept = json.loads(out.read_text())
    for number, row in enumerate(wanted):
        if "class" not in kept["rows"].get(row, ()):
            continue
        with tempfile.TemporaryDirectory(prefix="sarqc-models-") as place:
            staged(_build, row, Path(place) / "in")
            answers = kept["rows"][row]["dry_run"] = _dry_run(Path(place) / "in", Path(place), kept["rows"][row])
        out.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{number + 1}/{len(wanted)} {row}: {answers}", flush=True)


def one(row: str, work: Path, method: str = "") -> dict[str, Any]:
    """The result of a row: whether it builds, quantizes, and reloads to the same, without and with sarqc.

    Where the run is refused with a pattern that leaves the rest, it is run again with that pattern.
    """
    source, out = work / "in", work / "out"
    built = staged(_build, row, source)
    if built["how"] != "ok":
        return {"kind": "not built", "error": built["error"]}
    results = staged(_quantize, source, out, method, ())
    error = results["error"] and results["error"].replace(str(source), "the folder")
    built_class, needed = built["value"]
    result: dict[str, Any] = {"class": built_class, "quantize": results["how"], "error": error}
    result |= {"with": needed} if needed else {}
    pattern = re.search(r"--ignore '(.*)'$", results["error"] or "")
    if results["how"] == "refused" and pattern:
        result["ignore"] = pattern[1]
        results = staged(_quantize, source, out, method, (pattern[1],))
        result["ignored"] = results["how"]
    result |= results["value"] or {}
    result["dry_run"] = _dry_run(source, work, result)
    if results["how"] != "ok":
        return result | {"kind": kind(result)}
    checked = staged(_reference, row, source, out, work)
    if checked["how"] != "ok":
        return result | {"kind": "no reference", "reference": checked["error"]}
    for key, with_sarqc in (("transformers", False), ("sarqc", True)):
        checked = staged(_reloaded, row, out, work, with_sarqc)
        result[key] = checked["value"] or {"same": False, "error": checked["error"]}
    shutil.rmtree(out)
    return result | {"kind": kind(result)}


def kind(result: dict[str, Any]) -> str:
    """Works, works in part, refused, wrong: the row in two words."""
    if result["quantize"] == "ok":
        wrong = [key for key in ("transformers", "sarqc") if not result[key]["same"]]
        return "works" if not wrong else f"reload in {' and '.join(wrong)} fails"
    if result.get("ignored") == "ok":
        return "works in part"
    return "traceback" if result.get("ignored") == "traceback" else result["quantize"]


def summary_line(result: dict[str, Any]) -> str:
    """A row's result in a line."""
    share = f", {result['share']:.1%} of the weights" if "share" in result else ""
    return f"{result['kind']}{share}{': ' + result['error'][:200] if result.get('error') else ''}"


def staged(work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call `work` in a process of its own; how it ended (ok, refused, traceback, timeout), its value and its error.

    The process is forked from a server that only imported the libraries: a fork of this one would wait for ever
    at its first parallel loop if an OpenMP pool ran here before, and would have what was registered here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "transformers.modeling_utils",
            "compressed_tensors",
            "sarqc.entrypoints.quantize",
            "sarqc.pipeline.driver",
            "benchmarks.models.check",
            __name__,
        ]
    )
    answers: Any = context.Queue()
    child = context.Process(target=_answer, args=(answers, work, arguments))
    child.start()
    try:
        result: dict[str, Any] = answers.get(timeout=TIMEOUT)
    except Empty:
        result = {"how": "timeout", "value": None, "error": f"longer than {TIMEOUT} s"}
        child.kill()
    child.join()
    return result


def _answer(answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    from sarqc.errors import SarqcError

    torch.set_num_threads(1)
    try:
        answers.put({"how": "ok", "value": work(*arguments), "error": None})
    except SarqcError as error:
        answers.put({"how": "refused", "value": None, "error": str(error)})
    except BaseException as error:  # noqa: BLE001  # the sweep counts these
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        answers.put({"how": "traceback", "value": None, "error": text, "traceback": traceback.format_exc()})


def _build(row: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The class that is built, and the packages that it needs beside transformers' own, with versions."""
    model = build(row, folder)
    if condition := row.removesuffix("+vl").partition("@")[2]:
        CONDITION[condition](folder, model)
    return type(model).__name__, {name: sys.modules[name].__version__ for name in OPTIONAL if name in sys.modules}


def _quantize(source: Path, out: Path, method: str, ignore: tuple[str, ...]) -> dict[str, Any]:
    import sarqc
    from sarqc.checkpoint.reader import open_checkpoint

    more = {"method": method} if method else {}
    report = sarqc.quantize(source, out, ignore=ignore, **SETTINGS, **more).report
    targets = report["targets"]
    sizes = dict.fromkeys((*targets["left"], *targets["ignored"]), 0)
    with open_checkpoint(source) as checkpoint:
        for name in checkpoint.names():
            if (linear := name.removesuffix(".weight")) in sizes:
                shape = checkpoint.shape(name)
                sizes[linear] = 1
                for size in shape:
                    sizes[linear] *= size
    uncounted = {name for name, reason in targets["left"].items() if re.search(UNCOUNTED, reason)}
    unquantized = sum(size for name, size in sizes.items() if name not in uncounted)
    share = round(targets["weights"] / (targets["weights"] + unquantized), 4)
    known = all(sizes.values())  # a layer that is made of several tensors has no size of its own in the checkpoint
    with open_checkpoint(out) as checkpoint:
        layers = sorted({kind_of(linear) for linear in checkpoint.linears()})
    left = {kind_of(name): reason for name, reason in targets["left"].items()}
    found = {"linears": targets["quantized"], "layers": layers, "left": left, "serve": report["serve"]}
    return found | ({"share": share} if known else {})


def _dry_run(source: Path, work: Path, result: dict[str, Any]) -> dict[str, str]:
    answer = staged(compared, source, work, result, SETTINGS)
    return answer["value"] or dict.fromkeys(READINGS, answer["error"])


def _reference(row: str, source: Path, out: Path, work: Path) -> dict[str, Any]:
    from benchmarks.models import check

    return check.reference(row, source, out, work)


def _reloaded(row: str, out: Path, work: Path, with_sarqc: bool) -> dict[str, Any]:
    from benchmarks.models import check

    return check.compared(row, out, work, with_sarqc)


def _versions() -> dict[str, str]:
    import compressed_tensors
    import torch
    import transformers

    import sarqc

    modules = (sarqc, torch, transformers, compressed_tensors)
    return {module.__name__: module.__version__ for module in modules} | {"python": platform.python_version()}
