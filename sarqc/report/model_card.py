"""The model card: README.md of a checkpoint, for readers on a hub.

It says what was done, with what, how to run it and how to do it again; numbers stand in it only where they were
measured. The original's own card is not copied, because what it claims was measured on another model; of it only the
licence is taken over.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

from sarqc.config import DEFAULT_EFFORT, EFFORTS, METHODS, CalibrationConfig, MethodConfig, QuantConfig, RunConfig
from sarqc.model.dataset import NAMELESS
from sarqc.model.hub import SMOLLM2, is_hub_id, split_revision
from sarqc.options import command_words, default_of, record
from sarqc.report import summary
from sarqc.report.svg import text

CARD = "README.md"
_BASES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_TERMS = ("license", "license_name", "license_link")
_PLAIN = r"[\w.:/+-]+"
_LICENCE = re.compile(rf"^({'|'.join(_TERMS)}):[ \t]*['\"]?({_PLAIN})['\"]?[ \t]*$", re.MULTILINE)


def licence(folder: Path) -> dict[str, str]:
    """license, license_name and license_link as the card in `folder` states them, those that are plain words."""
    try:
        content = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = re.match(r"---\r?\n(.*?)\r?\n---\s", content, re.DOTALL)
    return dict(_LICENCE.findall(front.group(1).replace("\r", ""))) if front else {}


def card(report: summary.Report) -> str:
    """The card of a report (as `sarqc.report.report.read` returns it), Markdown with front matter."""
    name, quant = base_name(report["model"]), report["quant"]
    parts = [
        f"---\n{_front_matter(report)}\n---",
        f"# {_inline(name)}, {_bits(quant):g}-bit",
        f"{_inline(name)} with its weights in {_format(quant)}, made by "
        f"[sarqc](https://arxiv.org/abs/2605.05693) {_inline(report['versions'].get('sarqc', ''))}. "
        "Activations stay in 16 bits.",
        "## Run",
        "From inside this folder. Elsewhere replace the dot by its path or its hub id.",
        *(
            _fenced(line, "bash")
            for server, line in _servers(report).items()
            if summary.serves(report, server) is not False
        ),
        _fenced(_loading(report), "python"),
        _readers(report),
        "## What was done",
        _done(report),
        _quality(report),
        "## Do it again",
        _fenced(command(report), "bash"),
        _given(report),
        f"Versions: {', '.join(f'{_inline(k)} {_inline(str(v))}' for k, v in report['versions'].items())}. "
        "The same input on the same machine gives the same bytes. `report.html` has every layer's numbers.",
    ]
    return _sealed("\n\n".join(part for part in parts if part) + "\n")


def edited(folder: Path) -> bool:
    """Whether the card in `folder` is not as some version of this module wrote it; one that is missing is not."""
    try:
        content = (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True
    return content != _sealed(content.rpartition("\n<!-- sarqc")[0])


def _sealed(words: str) -> str:
    """The words with their own fingerprint below, by which it is seen later whether somebody edited them."""
    seal = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{words}\n<!-- sarqc renews this file for as long as what is above is {seal} -->\n"


def base_name(model: str) -> str:
    """What the model is called: a hub id, or a folder's own name without the path to it."""
    if model in _BASES:
        return _BASES[model]
    return model if is_hub_id(model) else model.rstrip("/").rpartition("/")[2] or "model"


def command(report: summary.Report) -> str:
    """The command line that repeats the run, with names for paths: a card is read on other machines."""
    quant, method, calibration = report["quant"], report["method"], report["calibration"]
    model = report["model"] if report["model"] in _BASES else base_name(report["model"])
    effort = report.get("effort", DEFAULT_EFFORT)
    own = record(MethodConfig(method["method"], effort)) if method["method"] in METHODS and effort in EFFORTS else {}
    mixed = quant.get("avg_bits") is not None
    usual = {name: default_of(QuantConfig, name) for name in ("sym", "ignore", "format")}
    numbers = quant | {"format": _format_name(report), "bits": None if mixed else quant["bits"]}
    words = ["sarqc", "quantize", model, "-o", "OUT", "--method", method["method"]]
    words += command_words(QuantConfig, numbers, usual)
    words += command_words(MethodConfig, method | {"method": None, "effort": effort}, own | {"effort": DEFAULT_EFFORT})
    if calibration:
        name = _YOURS if calibration["text"] in NAMELESS else summary.text_name(calibration["text"])
        data = {"dataset": name, "num_samples": calibration["windows"], "seed": 0} | calibration
        words += command_words(CalibrationConfig, data, {})
    given = {"dtype": report.get("dtype"), "trust_remote_code": report.get("trust_remote_code")}
    words += command_words(RunConfig, given)
    return " ".join(shlex.quote(_one_line(word)) for word in words)


_YOURS = "YOUR_DATA"


def _given(report: summary.Report) -> str:
    """What no command line can say, in words."""
    calibration = report["calibration"]
    if not calibration or calibration["text"] not in NAMELESS:
        return ""
    return f"{_YOURS} stands for {calibration['text']}: in Python, `sarqc.quantize(dataset=...)` takes them."


_LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(".")"""


def _loading(report: summary.Report) -> str:
    """What loads the folder, with what transformers needs for it."""
    if _format_name(report) == MLX:
        return 'import sarqc  # where there is no MLX\n\nmodel, tokenizer = sarqc.load(".")'
    alone = _format_name(report) == "compressed-tensors" and not _only_here(report)
    return _LOADING if alone else f"import sarqc  # so that transformers reads it\n{_LOADING}"


def _only_here(report: summary.Report) -> str | None:
    """What transformers does not load of compressed-tensors without `import sarqc`."""
    if not report["quant"]["sym"]:
        return "asymmetric weights"
    return "quantized embeddings" if report["targets"].get("embeddings") else None


_SERVERS = {"vLLM": "vllm serve .", "SGLang": "python -m sglang.launch_server --model-path ."}
MLX = "mlx"


def _servers(report: summary.Report) -> dict[str, str]:
    """A command line for each server that may read the folder."""
    return {"mlx-lm": "mlx_lm.generate --model . --prompt hello"} if _format_name(report) == MLX else _SERVERS


def _readers(report: summary.Report) -> str:
    """Runtimes that support the folder, and what they need for it."""
    quant, format = report["quant"], _format_name(report)
    if format == MLX:
        return "mlx-lm reads the format from config.json; vLLM, SGLang and transformers do not read it."
    lines = ["The servers read the format from config.json."]
    for server in _SERVERS:
        if (taken := summary.serves(report, server)) is None:
            lines.append(f"Kernels of {server} were not checked.")
        elif not taken:
            lines.append(f"{server} has no kernels for all of its layers.")
    if format != "compressed-tensors":
        lines.append("transformers needs the package `gptqmodel`, or `import sarqc` before.")
    elif (what := _only_here(report)) is not None:
        lines.append(f"transformers needs `import sarqc` before: alone it does not load {what}.")
    else:
        lines.append("transformers needs the package `compressed-tensors`.")
    if quant.get("avg_bits") is not None:
        lines.append("Layers have different widths: experts of several ones need `import sarqc` too.")
    return " ".join([*lines, "None of them was run for this checkpoint."])


def _format_name(report: summary.Report) -> str:
    return str(report.get("format", "compressed-tensors"))


def _front_matter(report: summary.Report) -> str:
    from huggingface_hub import ModelCardData

    model, bits = report["model"], _bits(report["quant"])
    base = _BASES.get(model) or (split_revision(model)[0] if is_hub_id(model) else None)
    source = report.get("source", {})
    stated = {term: source[term] for term in _TERMS if re.fullmatch(_PLAIN, str(source.get(term, "")))}
    values: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": "mlx" if _format_name(report) == MLX else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sarqc", "quantized", _format_name(report), f"w{bits:g}a16"],
        **stated,
    }
    return str(ModelCardData(**{key: value for key, value in values.items() if value is not None}).to_yaml()).strip()


def _format(quant: dict[str, Any]) -> str:
    group = "one scale a row" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    return f"{summary.width(quant)} ({group}, {'symmetric' if quant['sym'] else 'asymmetric'})"


def _bits(quant: dict[str, Any]) -> float:
    average = quant.get("avg_bits")
    return float(quant["bits"] if average is None else average)


def _done(report: summary.Report) -> str:
    method, calibration, size = report["method"], report["calibration"], report["size"]
    lines = [f"- method `{_inline(method['method'])}`{_inline(summary.settings(report))}"]
    if calibration:
        lines.append(
            f"- calibrated on {calibration['windows']} sequences of {calibration['seqlen']} tokens of "
            f"{_inline(summary.text_name(calibration['text']))} (sha256 of the tokens "
            f"{_inline(str(calibration.get('fingerprint', 'not recorded')))[:16]})"
        )
    else:
        lines.append("- no calibration text")
    kind = "output error on the calibration text" if calibration else "weight error"
    lines.append(f"- {kind} {summary.share(report['error'])}; RTN has {summary.share(report['rtn_error'])}")
    lines.append(f"- {report['targets']['quantized']} layers at {size['bits_per_weight']} bits per weight with scales")
    if fallbacks := report["fallbacks"]:
        lines.append(f"- {len(fallbacks)} of {len(report['sites'])} sites were quantized by RTN; report.html says why")
    lines += [f"- concern: {_inline(concern)}" for concern in summary.verdict(report).concerns]
    return "\n".join(lines)


def _quality(report: summary.Report) -> str:
    rows = [
        f"| {_inline(summary.text_name(entry['text']))} | {entry.get('windows', '')} of {entry.get('seqlen', '')} "
        f"| {_cell(entry.get('before'), '.3f')} | {entry['after']:.3f} "
        f"| {_cell(entry.get('agreement'), '.1%')} | {_cell(entry.get('kl'), '.4f')} |"
        for entry in report.get("quality", [])
    ]
    head = "| text | sequences | perplexity of the original | of this | next token agrees | KL, nats |"
    return "\n".join(["## Quality, measured\n", head, "|---" * 6 + "|", *rows]) if rows else ""


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _one_line(word: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in word)


def _inline(word: str) -> str:
    """Foreign words inside Markdown: nothing in them may begin a tag, a link, a cell or code."""
    return re.sub(r"([\\`*_\[\]|#!])", r"\\\1", text(word)) if re.search(r"[\\`*\[\]|#!<>&]", word) else text(word)


def _fenced(code: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"
