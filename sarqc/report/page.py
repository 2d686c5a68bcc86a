"""report.html: the whole run on one page that needs no network and no script.

On top the summary: a sentence, concerns, six numbers. Below: errors by layer, quality, bit-widths, lambdas, error
correction, tokens per expert, sizes, time, layers left unquantized, settings. Empty sections are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sarqc.report import summary
from sarqc.report.svg import STYLE, Axes, Series, line_chart, range_chart, short, stacked_bars, text

_PAGE_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1c2126; --dim: #68727c; --edge: #e3e6e9;
  --good: #1d7f5a; --look: #b4541a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --text: #e8ebee; --dim: #9aa5b0;
  --edge: #343b42; --good: #57c79a; --look: #f0a05d; } }
* { box-sizing: border-box } body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem;
  background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; font-weight: 500; color: var(--dim); margin: 0 }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .3rem }
p { margin: .2rem 0 .6rem } .dim { color: var(--dim) }
.verdict { font-size: 1.45rem; line-height: 1.35; font-weight: 600; margin: .35rem 0 .6rem; border-left: 5px solid;
  padding-left: .8rem } .good { border-color: var(--good) } .look { border-color: var(--look) }
ul { margin: .3rem 0; padding-left: 1.2rem } .concerns { color: var(--look) }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0 }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: .6rem .8rem; flex: 1 1 8.6rem }
.tile b { display: block; font-size: 1.25rem; font-weight: 600; line-height: 1.3; white-space: nowrap }
.tile span { color: var(--dim); font-size: .85rem }
figure { margin: .6rem 0 0; background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: .8rem .8rem .4rem } figure svg { width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem } td, th { text-align: left; vertical-align: top;
  padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--edge); font-weight: 400 } th { color: var(--dim) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
details { margin: .4rem 0 } summary { cursor: pointer; color: var(--dim) }
"""
_STAGES = ("load", "reference", "forward", "solve")
_NAMED = 40


def page(report: summary.Report) -> str:
    """The page of a report (as `sarqc.report.report.read` returns it)."""
    found = summary.verdict(report)
    concerns = "".join(f"<li>{text(concern)}</li>" for concern in found.concerns)
    sections = (
        _losses(report),
        _quality(report),
        _widths(report),
        _lambdas(report),
        _corrections(report),
        _experts(report),
        _worst(report),
        _fallbacks(report),
        _sizes(report),
        _time(report),
        _left_alone(report),
        _settings(report),
    )
    title = text(f"{_model(report)} · sarqc")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_PAGE_STYLE}{STYLE}</style></head><body>\n"
        f"<header><h1>{text(_model(report))}</h1>\n"
        f'<p class="verdict {"good" if found.good else "look"}">{text(found.sentence)}</p>'
        + (f'<ul class="concerns">{concerns}</ul>' if concerns else "")
        + f'\n<div class="tiles">{_tiles(report)}</div></header>\n'
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# -- the top --------------------------------------------------------------------------------------------------------


def _tiles(report: summary.Report) -> str:
    sizes, memory = report["size"], report["peak_memory_mib"]
    before = report.get("source", {}).get("bytes")
    kind = "output" if summary.calibrated(report) else "weight"
    tiles = [
        (f"{sizes['bits_per_weight']:.3g}", "bits per quantized weight"),
        (
            f"{summary.human(before)} → {summary.human(sizes['bytes'])}" if before else summary.human(sizes["bytes"]),
            f"size, {sizes['bytes'] / before:.0%} of the original" if before else "size",
        ),
        (
            summary.share(report["error"]),
            f"{kind} error (RTN {summary.share(report['rtn_error'])})",
        ),
    ]
    for entry in report.get("quality", [])[:1]:
        told = " → ".join(summary.figure(entry[when]) for when in ("before", "after") if entry.get(when))
        tiles.append((told, f"perplexity on {summary.text_name(entry['text'])}"))
    tiles += [
        (str(len(report["fallbacks"])), f"fallbacks in {len(report['sites'])} sites"),
        (duration(report["seconds"].get("total", 0.0)), f"on {report['device']}"),
        (
            summary.human(max(memory.values(), default=0) * 2**20),
            f"peak memory, {max(memory, key=memory.get, default='host')}",
        ),
    ]
    return "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in tiles)


# -- where it was lost ----------------------------------------------------------------------------------------------


def _losses(report: summary.Report) -> str:
    found = summary.sites(report)
    plain = "weight error" if not summary.calibrated(report) else "output error"
    errors = _by_kind(found, lambda site: site.error, lambda v: f"{plain} {summary.share(v)}")
    charts = [line_chart(errors, Axes("block", plain, "log", unit=lambda v: f"{100 * v:.3g} %"))]
    told = f"Each point is a site: the layers that read one input, named by the first. {plain.capitalize()} by depth."
    if summary.calibrated(report):
        losses = _by_kind(found, lambda site: site.loss, lambda v: f"{v:.3g} of RTN")
        charts.insert(0, line_chart(losses, Axes("block", "error / RTN", "log"), mark=(1.0, "RTN")))
        told += " Above: as a share of what RTN loses; a point above the dashed line was harmed."
    return _section("Where it was lost", told, *(f"<figure>{chart}</figure>" for chart in charts if chart))


def _widths(report: summary.Report) -> str:
    found = [site for site in summary.sites(report) if site.bits]
    if len({site.bits for site in found}) < 2:
        return ""
    series = _by_kind(found, lambda site: site.bits, lambda v: f"{v:.0f} bits")
    chart = line_chart(series, Axes("block", "bits"))
    average = report["size"]["bits_per_weight"]
    told = (
        f"{average} bits per weight on average, scales included. Bit-widths were allocated "
        "before any block was quantized: they minimise the sum of the measured sensitivities of all sites."
    )
    return _section("Bits by layer", told, f"<figure>{chart}</figure>")


def _lambdas(report: summary.Report) -> str:
    found = [site for site in summary.sites(report) if site.reg_lambda > 0]
    series = _by_kind(found, lambda site: site.reg_lambda, lambda v: f"lambda {v:.3g}")
    chart = line_chart(series, Axes("block", "lambda", "log"))
    told = "Weight of the regulariser relative to the output error. More calibration text needs a smaller lambda."
    return _section("Regularisation lambda", told, f"<figure>{chart}</figure>") if chart else ""


def _corrections(report: summary.Report) -> str:
    found = [site for site in summary.sites(report) if site.correction_share > 0]
    series = _by_kind(found, lambda site: site.correction_share, lambda v: f"share {v:.2f}")
    chart = line_chart(series, Axes("block", "share"))
    told = (
        "One layer of each block also corrects the drift of the hidden states from the original model, by this share: "
        "half of the share that is best on held-out text."
    )
    return _section("Residual error correction", told, f"<figure>{chart}</figure>") if chart else ""


def _by_kind(found: list[summary.SiteFacts], value: Any, said: Any) -> list[Series]:
    return [
        Series(kind, tuple((block, number, f"{site.name}: {said(number)}") for block, number, site in points))
        for kind, points in summary.lines(found, value).items()
    ]


def _quality(report: summary.Report) -> str:
    rows = [
        (
            entry["text"],
            f"{entry.get('windows', '')} of {entry.get('seqlen', '')}",
            f"{entry['before']:.3f}" if entry.get("before") else "",
            f"{entry['after']:.3f}",
            f"{entry['after'] / entry['before'] - 1:+.1%}" if entry.get("before") else "",
            f"{entry['agreement']:.1%}" if entry.get("agreement") is not None else "",
            f"{entry['kl']:.4f}" if entry.get("kl") is not None else "",
        )
        for entry in report.get("quality", [])
    ]
    head = ("text", "sequences", "perplexity before", "after", "change", "next token agrees", "KL, nats")
    told = "On text that stands beside the number, by the same code for the original and the result."
    return _section("Quality, measured", told, _table(head, rows, numbers=6)) if rows else ""


def _experts(report: summary.Report) -> str:
    loads = summary.loads(report)
    if not loads:
        return ""
    rows = [
        (
            load.block,
            min(load.rows),
            load.median,
            max(load.rows),
            f"{load.site}: {min(load.rows)} to {max(load.rows)} tokens, median {load.median:.0f}",
        )
        for load in loads
    ]
    named = [
        f"block {load.block}: expert {expert} ({tokens} {'token' if tokens == 1 else 'tokens'})"
        for load in loads
        for expert, tokens in load.starved
    ]
    rest = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    told = (
        f"Starved, with at most a tenth of their layer's median: {', '.join(named[:_NAMED])}{rest}."
        if named
        else "No expert had less than a tenth of its layer's median."
    )
    chart = range_chart(rows, x_label="block", y_label="tokens per expert")
    return _section("Who saw how much text", told, f"<figure>{chart}</figure>")


def _worst(report: summary.Report) -> str:
    rows = [
        (
            site.name,
            summary.share(site.error),
            summary.share(site.rtn_error),
            short(site.loss) if site.loss is not None else "",
            short(site.reg_lambda),
            short(site.record.get("damping", 0.0)),
        )
        for site in summary.worst(report)
    ]
    head = ("site", "error", "RTN", "ratio", "lambda", "damping")
    return _section("The worst ten sites", "By error.", _table(head, rows, numbers=5)) if rows else ""


def _fallbacks(report: summary.Report) -> str:
    rows = list(report["fallbacks"].items())
    told = "Sites that were quantized by RTN instead of solved, and why."
    return _section("Fallbacks", told, _table(("site", "reason"), rows)) if rows else ""


# -- what it cost ---------------------------------------------------------------------------------------------------


def _sizes(report: summary.Report) -> str:
    found = report["size"]
    left = found["bytes"] - found["quantized_bytes"]
    rows = [
        ("quantized weights", f"{found['quantized_weights']:,}", summary.human(found["quantized_bytes"])),
        ("everything else, as it was", "", summary.human(left)),
        ("together", "", summary.human(found["bytes"])),
    ]
    if before := report.get("source", {}).get("bytes"):
        rows.append(("the original", "", summary.human(before)))
    told = f"{found['bits_per_weight']} bits per quantized weight, with scales and zeros."
    return _section("Size", told, _table(("", "weights", "size"), rows, numbers=2))


def _time(report: summary.Report) -> str:
    seconds = report["seconds"]
    stages = [*(s for s in _STAGES if s in seconds), *(s for s in seconds if s not in {*_STAGES, "total"})]
    total = max(seconds.get("total", 0.0), sum(seconds[stage] for stage in stages), 1e-9)
    rows = [(stage, duration(seconds[stage]), f"{seconds[stage] / total:.0%}") for stage in stages]
    rest = total - sum(seconds[stage] for stage in stages)
    rows += [("reading, writing, checking", duration(rest), f"{rest / total:.0%}"), ("total", duration(total), "")]
    parts = [_table(("stage", "time", "share"), rows, numbers=2)]
    if blocks := report.get("blocks"):
        columns = [(b["index"], [b["seconds"].get(stage, 0.0) for stage in stages]) for b in blocks]
        chart = stacked_bars(columns, stages, x_label="block", y_label="seconds", unit=duration)
        parts.insert(0, f"<figure>{chart}</figure>")
    memory = ", ".join(f"{name} {summary.human(mib * 2**20)}" for name, mib in report["peak_memory_mib"].items())
    return _section("Time and memory", f"Peak memory: {memory}.", *parts)


# -- what was done --------------------------------------------------------------------------------------------------


def _left_alone(report: summary.Report) -> str:
    found = report["targets"]
    ignored: dict[str, str] = found.get("ignored", {})
    left: dict[str, str] = found.get("left", {})
    rows = [
        (
            name,
            str(count),
            reason or "outside the blocks, or not used by transformers",
        )
        for (name, reason), count in _folded(
            (name, _reason(name, ignored, left)) for name in found.get("untouched", [])
        )
    ]
    told = f"{found['quantized']} layers were quantized. Norms and embeddings always stay; so do these:"
    return _section("Left unquantized", told, _table(("layer (* counts)", "how many", "why"), rows))


def _reason(name: str, ignored: Mapping[str, str], left: Mapping[str, str]) -> str:
    return f"ignore pattern {ignored[name]}" if name in ignored else left.get(name, "")


def _folded(names: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    """Names that differ in numbers only, counted as one."""
    counts: dict[tuple[str, str], int] = {}
    for name, reason in names:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), reason)
        counts[key] = counts.get(key, 0) + 1
    return list(counts.items())


def _settings(report: summary.Report) -> str:
    parts = []
    for heading, key in _SETTINGS.items():
        values = report.get(key)
        if isinstance(values, dict):
            rows = [(name, _plain(value)) for name, value in values.items()]
            parts.append(f"<details><summary>{heading}</summary>{_table(('', ''), rows)}</details>")
    told = f"Model: {report['model']}. On disk: {report.get('format', 'compressed-tensors')}."
    return _section("Settings and versions", told, *parts)


_SETTINGS = {
    "Numbers": "quant",
    "Method": "method",
    "Calibration": "calibration",
    "Servers, and on how many ranks": "serve",
    "Versions": "versions",
}
"""What is folded up at the end of the page, and its key in the report."""


def _plain(value: object) -> str:
    if value is None:
        return "not known"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _model(report: summary.Report) -> str:
    return str(report["model"]).rstrip("/").rpartition("/")[2] or str(report["model"])


def _section(heading: str, told: str, *parts: str) -> str:
    return f'<section><h2>{text(heading)}</h2><p class="dim">{text(told)}</p>{"".join(parts)}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table whose last `numbers` columns are numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        first = len(cells) - numbers
        classes = ['class="number"' if index >= first else "" for index in range(len(cells))]
        return "".join(f"<{tag} {c}>{text(cell)}</{tag}>" for c, cell in zip(classes, cells))

    top = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"
