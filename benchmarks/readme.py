"""Write the tables of README.md and docs/ from the committed results: python -m benchmarks.readme [--check].

Each table stands between two markers, <!-- name --> and <!-- /name -->. --check only says whether they are current.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from benchmarks import names, reliability
from benchmarks.quality import proof
from sarqc.comparison.table import Row, perplexity
from sarqc.config import METHODS, QUANTIZE, MethodConfig
from sarqc.options import options

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


PICTURE_MODEL, PICTURE_TEXT = "whole-smollm2", "wikitext.txt"
PICTURE_METHODS = ("rtn", "llm-compressor gptq", "GPTQModel", "sarqc-gptq")
"""What the picture at the top of the README compares."""


def picture_rows() -> tuple[float, dict[int, dict[str, Row]]]:
    """The unquantized model's perplexity, and bits -> method -> row of what the README's picture shows."""
    record = _read(PICTURE_MODEL)
    unquantized = next(entry["perplexity"] for entry in record["protocol"]["texts"] if entry["text"] == PICTURE_TEXT)
    rows: dict[int, dict[str, Row]] = {}
    for row in record["rows"]:
        wanted = row["text"] == PICTURE_TEXT and row["method"] in PICTURE_METHODS
        if wanted and (row["windows"] == WHOLE_WINDOWS or row["method"] == "rtn"):
            rows.setdefault(row["bits"], {})[row["method"]] = row
    return unquantized, rows


def picture() -> str:
    """What the picture at the top of the README shows, and where its numbers are from."""
    unquantized, rows = picture_rows()
    tools = _read(PICTURE_MODEL)["protocol"]["tools"]
    best = {
        bits: min((row["perplexity"], name) for name, row in each.items() if name != "sarqc-gptq")
        for bits, each in rows.items()
    }
    against = "; ".join(
        f"{bits} bits: {rows[bits]['sarqc-gptq']['perplexity']:.1f} against {value:,.1f} ({name})"
        for bits, (value, name) in sorted(best.items(), reverse=True)
    )
    usual = rows[max(rows)]["rtn"]["group_size"]
    others = {bits: each["rtn"]["group_size"] for bits, each in rows.items() if each["rtn"]["group_size"] != usual}
    groups = ", ".join([str(usual), *(f"{size} at {bits} bits" for bits, size in others.items())])
    return (
        f"*Perplexity on held-out WikiText-2 articles, SmolLM2-135M (unquantized {unquantized:.1f}), on a CPU. "
        f"SARQC and the best other tool at {against}. Symmetric groups of {groups}; {WHOLE_WINDOWS} calibration "
        f"sequences of 512 tokens, the same for all tools: {tools['llm-compressor gptq']} (GPTQ), "
        f"{tools['GPTQModel']}. "
        "[All measurements](#quality).*"
    )


def demo() -> str:
    """What `make demo` measured."""
    lines = ["| method | bits | size | bits per weight | perplexity | seconds |", "|---|---|---|---|---|---|"]
    for row in _read("cpu-demo"):
        cells = (row["method"], row["bits"], f"{row['bytes'] / 1e6:.0f} MB", row["bits_per_weight"])
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['perplexity']:.2f} | {seconds} |")
    return "\n".join(lines)


WHOLE_WINDOWS = 16
"""Calibration windows of the whole runs in the README; docs/ has the others."""


def whole() -> str:
    """Whole runs of ours and of other tools."""
    return _whole(perplexity, lambda row: row["windows"] == WHOLE_WINDOWS)


def amounts() -> str:
    """The same over calibration sizes, where there are several."""
    return _whole(perplexity, lambda row: len(row["sizes"]) > 1, windows=True)


def divergence() -> str:
    """How far the runs of the README are from the model they were made from."""

    def shown(row: Row) -> str:
        return "" if row["kl"] is None else f"{row['kl']:.3f}, {100 * row['agreement']:.0f} %"

    return _whole(shown, lambda row: row["windows"] == WHOLE_WINDOWS, reference=False)


def _whole(
    shown: Callable[[Row], str], wanted: Callable[[Row], bool], *, windows: bool = False, reference: bool = True
) -> str:
    """A row for each model, format, text and calibration size that is wanted, a column for each method."""
    cases: dict[tuple[Any, ...], dict[str, str]] = {}
    sizes: dict[tuple[Any, ...], set[int]] = {}
    actual = [_read(path.stem) for path in sorted(RESULTS.glob("whole-*.json"))]
    rows = [(results["protocol"], row) for results in actual for row in results["rows"]]
    for protocol, row in rows:
        if row["method"] != "rtn":
            sizes.setdefault((protocol["model"], row["bits"], row["group_size"]), set()).add(row["windows"])
    for protocol, row in rows:
        made = sizes.get((protocol["model"], row["bits"], row["group_size"]), set())
        if row["windows"] in made and wanted(row | {"sizes": made}):
            reached = {entry["text"]: f"{entry['perplexity']:.2f}" for entry in protocol["texts"]}
            what = Path(protocol["model"]).name, -row["bits"], -row["group_size"], Path(row["text"]).stem
            cells = cases.setdefault((*what, row["windows"]), {"unquantized": reached[row["text"]]})
            cells[row["method"]] = shown(row)
    methods = sorted({method for cells in cases.values() for method in cells} - {"unquantized"}, key=_place)
    head = ["model", "bits, group", "text", *(["sequences"] if windows else []), *methods]
    head += ["unquantized"] if reference else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case in sorted(cases):
        model, bits, group_size, text, count = case
        own = {
            "model": model,
            "bits, group": f"{-bits}, {-group_size}",
            "text": text,
            "sequences": str(count),
            **cases[case],
        }
        lines.append(f"| {' | '.join(own.get(name, '') for name in head)} |")
    return "\n".join(lines)


def _place(method: str) -> tuple[int, str]:
    """RTN, other tools, ours."""
    return 0 if method == "rtn" else 2 if method in METHODS else 1, method


def speed() -> str:
    """One run beside a forward pass and a rival, on each processor that there is a record of."""
    names = {"forward": "one forward pass", "sarqc": "sarqc quantize", "llm-compressor": "llm-compressor 0.14 GPTQ"}
    records = [_read(path.stem) for path in sorted(RESULTS.glob("cpu-smollm2-speed*.json"), reverse=True)]
    first, lines, ratios = records[0], [], []
    for record in records:
        processor, dtype = _processor(record), record.get("rival_dtype", "auto")
        for name, row in record["medians"].items():
            cells = (row["inner_seconds"], row["wall_seconds"], row["cpu_seconds"], row["peak_mib"])
            what = names[name] + (f" in {dtype}" if name == "llm-compressor" and dtype != "auto" else "")
            lines.append(f"| {processor} | {what} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
        measured = record["ratios"]
        ratios.append(
            f"On the {processor} SARQC takes {measured['run / forward']} times as long as one forward pass of the "
            f"calibration text. llm-compressor takes {measured['rival / ours, inner_seconds']} times as long as SARQC "
            f"and {measured['rival / ours, peak_mib']} times its memory."
        )
    return "\n".join(
        [
            f"SmolLM2-135M at 4 bits in groups of 64, 16 sequences of 512 tokens, {first['cpus']} CPU cores, in turns; "
            f"torch {first['versions']['torch']}, transformers {_each(records, 'transformers')}, "
            f"medians of {' and '.join(str(len(record['runs']['sarqc'])) for record in records)} rounds:",
            "",
            "| processor | | seconds, without start-up | seconds, whole process | CPU seconds | peak MiB |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            *ratios,
            "",
            _contention(),
            "",
            _forecast(),
        ]
    )


def _each(records: list[dict[str, Any]], package: str) -> str:
    """Versions of a package in records, each once."""
    return " and ".join(dict.fromkeys(record["versions"][package] for record in records))


def _processor(record: dict[str, Any]) -> str:
    """Name of the processor of a record, without marks."""
    return " ".join(re.sub(r"\((?:R|TM)\)|Processor|CPU", "", record["machine"]["cpu"]).split())


def _contention() -> str:
    """What a run takes beside others, on each processor that there is a record of."""
    records = [_read(path.stem) for path in sorted(RESULTS.glob("cpu-contention*.json"), reverse=True)]
    each = [(_processor(record), record["ratios"]) for record in records]
    return " ".join(
        f"On the {processor} moe-8m takes {ratios['two at once']} times as long when two runs go at once, "
        f"{ratios['beside 1 busy']} times beside one busy thread and {ratios['beside 3 busy']} times beside three."
        for processor, ratios in each
    )


def _forecast() -> str:
    """How far forecasts were from runs, on each processor that there is a record of."""
    records = [_read(path.stem) for path in sorted(RESULTS.glob("cpu-forecast*.json"), reverse=True)]
    each = []
    for record in records:
        ratios = ", ".join(f"{run['run / forecast']} ({run['model']})" for run in record["runs"])
        each.append(f"{ratios} on the {_processor(record)}")
    return f"The time of a run over its forecast (`python -m benchmarks.forecast`) is {'; '.join(each)}."


def head() -> str:
    """What a quantized head and quantized embeddings cost."""
    record = _read("head")
    lines = ["| bits | also quantized | size | perplexity |", "|---|---|---|---|"]
    for row in record["rows"]:
        own = f", embeddings at {row['embedding_bits']} bits" if "embedding_bits" in row else ""
        also = ", ".join(f"`{name}`" for name in row.get("include", ())) + own
        lines.append(f"| {row['bits']} | {also} | {row['bytes'] / 1e6:.0f} MB | {row['perplexity']:.2f} |")
    return "\n".join(lines)


def effort() -> str:
    """What each effort takes and gives."""
    record = _read("cpu-effort")
    texts = record["protocol"]["texts"]
    shown = [f"{Path(text['text']).stem}: perplexity (unquantized {text['perplexity']:.2f}), KL" for text in texts]
    heads = ["bits", "`--effort`", "times the default", "seconds", "CPU seconds", *shown]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in record["rows"]:
        spent, quality = row["medians"], [row["quality"][text["text"]] for text in texts]
        cells = [f"{row['ratios']['cpu_seconds']:.2f}", f"{spent['inner_seconds']:.0f}", f"{spent['cpu_seconds']:.0f}"]
        cells += [f"{one['perplexity']:.2f}, {one['kl']:.4f}" for one in quality]
        lines.append(f"| {row['bits']} | {row['effort']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare() -> str:
    """Every method on the same statistics, with the spread over seeds: a table for each committed comparison."""
    return "\n\n".join(proof.markdown(_read(path.stem)) for path in sorted(RESULTS.glob("compare-*.json")))


def inference() -> str:
    """Packed weights beside the same weights in 16 bits, while they run."""
    record = _read("cpu-inference")
    steps = record["steps"]
    prefills = ", ".join(
        f"{step['ratio']:.2f} ({name.removeprefix('prefill ')} tokens)"
        for name, step in steps.items()
        if name != "decode"
    )
    return (
        f"Inference on a CPU: SmolLM2-135M with packed 4-bit weights against bf16, runs in turns on "
        f"{record['machine']['threads']} threads ({record['machine']['processor']}). Decode is "
        f"{steps['decode']['ratio']:.2f} times as fast; prefill is {prefills} times as fast. The model takes "
        f"{record['bytes']['ratio']:.2f} of the memory, its quantized layers "
        f"{record['bytes of quantized layers']['ratio']:.2f} "
        "(`python -m benchmarks.inference CHECKPOINT RESULTS.json`)."
    )


def faults() -> str:
    """What was tried to lose a run or a checkpoint, and how each try ended."""
    return reliability.table(_read("reliability"))


def faults_summed() -> str:
    """The same in a sentence."""
    return reliability.sentence(_read("reliability"))


def methods() -> str:
    """What each method is, in a line."""
    rows = (f"| `{name}` | {method.about} |" for name, method in METHODS.items())
    return "\n".join(["| `--method` | what it is |", "|---|---|", *rows])


def configs() -> str:
    """The options, by the class that has them."""
    rows = (f"| `{config.__name__}` | {', '.join(options(config))} |" for config in QUANTIZE)
    return "\n".join(["| class | fields |", "|---|---|", *rows])


def presets() -> str:
    """What each method is made of: its solver, and its own values of the options."""
    lines = ["| method | calibrated | channel scales | solver |", "|---|---|---|---|"]
    shown = {"saliency": "saliency", "reg_lambda": "λ", "scales": "scales", "act_order": "column order"}
    shown |= {"cd_passes": "passes", "error_correction": "correction"}
    lines[0] += "".join(f" {title} |" for title in shown.values())
    lines[1] += "---|" * len(shown)
    for name, method in METHODS.items():
        cells = [f"`{name}`", _mark(method.calibrated), _mark(method.channel_scales), method.solver.upper()]
        for option in shown:
            needs = options(MethodConfig)[option].needs
            value = MethodConfig(name).own(option) if method.offers(needs) else ""
            cells.append(_mark(value) if isinstance(value, bool) else str(value))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mark(value: bool) -> str:
    return "yes" if value else ""


SECTIONS: dict[str, Callable[[], str]] = {
    "picture": picture,
    "demo": demo,
    "head": head,
    "whole": whole,
    "amounts": amounts,
    "divergence": divergence,
    "speed": speed,
    "effort": effort,
    "compare": compare,
    "inference": inference,
    "reliability": faults_summed,
    "faults": faults,
    "methods": methods,
    "presets": presets,
    "configs": configs,
}
README_HAS = frozenset({"picture", "methods", "demo", "whole", "speed", "inference", "reliability"})


def filled(text: str, has: Collection[str] = README_HAS) -> str:
    """A page with its tables as the results have them; `has`: those that it must have."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not pattern.search(text):
            if name not in has:
                continue
            raise SystemExit(f"README.md has no markers for {name!r}")
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def _read(name: str) -> Any:
    return names.current(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def pages() -> dict[Path, tuple[str, str]]:
    """Each page with tables: what it says, and what the results say."""
    contents = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        contents[path] = text, filled(text, README_HAS if path.stem == "README" else ())
    return contents


def main() -> None:
    for path, (before, after) in pages().items():
        if before != after and "--check" in sys.argv:
            raise SystemExit(f"{path} is not what the results say: python -m benchmarks.readme")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
