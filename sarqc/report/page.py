"""report.html: the whole run on one page that needs no network and no script.

On top the summary: a sentence, concerns, six numbers. Below: errors by layer, quality, bit-widths, lambdas, error
correction, tokens per expert, sizes, time, layers left unquantized, settings. Empty sections are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sarqc.conventions import star
from sarqc.report import summary
from sarqc.report.markup import document, figures, headline, pair, section, table, tiles
from sarqc.report.svg import Axes, Series, line_chart, range_chart, short, stacked_bars

_STAGES = ("load", "reference", "forward", "solve")
_NAMED = 40


def page(report: summary.Report) -> str:
    """The page of a report (as `sarqc.report.report.read` returns it)."""
    result = summary.verdict(report)
    sections = (
        _losses(report),
        _quality(report),
        _widths(report),
        pair(_lambdas(report), _corrections(report)),
        _experts(report),
        _worst(report),
        _fallbacks(report),
        _sizes(report),
        _time(report),
        _left_alone(report),
        _settings(report),
    )
    header = headline(_model(report), result.sentence, result.good, result.concerns) + tiles(_numbers(report))
    return document(f"{_model(report)} · sarqc", header, sections)


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# -- the top --------------------------------------------------------------------------------------------------------


def _numbers(report: summary.Report) -> list[tuple[str, str]]:
    sizes, memory = report["size"], report["peak_memory_mib"]
    before = report.get("source", {}).get("bytes")
    kind = "output" if summary.calibrated(report) else "weight"
    rows = [
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
        change = " → ".join(summary.figure(entry[when]) for when in ("before", "after") if entry.get(when))
        rows.append((change, f"perplexity on {summary.text_name(entry['text'])}"))
    rows += [
        (str(len(report["fallbacks"])), f"fallbacks in {len(report['sites'])} sites"),
        (duration(report["seconds"].get("total", 0.0)), f"on {report['device']}"),
        (
            summary.human(max(memory.values(), default=0) * 2**20),
            f"peak memory, {max(memory, key=memory.get, default='host')}",
        ),
    ]
    return rows


# -- where it was lost ----------------------------------------------------------------------------------------------


def _losses(report: summary.Report) -> str:
    sites = summary.sites(report)
    plain = "weight error" if not summary.calibrated(report) else "output error"
    errors = _by_kind(sites, lambda site: site.error, lambda v: f"{plain} {summary.share(v)}")
    charts = [line_chart(errors, Axes("block", plain, "log", unit=lambda v: f"{100 * v:.3g} %"))]
    caption = (
        f"Each point is a site: the layers that read one input, named by the first. {plain.capitalize()} by depth."
    )
    if summary.calibrated(report):
        losses = _by_kind(sites, lambda site: site.loss, lambda v: f"{v:.3g} of RTN")
        charts.insert(0, line_chart(losses, Axes("block", "error / RTN", "log"), mark=(1.0, "RTN")))
        caption += " The first chart shows it as a share of what RTN loses; a point above the dashed line was harmed."
    return section("Where it was lost", caption, figures(*charts))


def _widths(report: summary.Report) -> str:
    sites = [site for site in summary.sites(report) if site.bits]
    if len({site.bits for site in sites}) < 2:
        return ""
    series = _by_kind(sites, lambda site: site.bits, lambda v: f"{v:.0f} bits")
    chart = line_chart(series, Axes("block", "bits"))
    average = report["size"]["bits_per_weight"]
    caption = (
        f"{average} bits per weight on average, scales included. Bit-widths were allocated "
        "before any block was quantized: they minimise the sum of the measured sensitivities of all sites."
    )
    return section("Bits by layer", caption, figures(chart))


def _lambdas(report: summary.Report) -> str:
    sites = [site for site in summary.sites(report) if site.reg_lambda > 0]
    caption = "Weight of the regulariser relative to the output error. More calibration text needs a smaller lambda."
    axes = Axes("block", "lambda", "log")
    return _by_depth("Regularisation lambda", caption, sites, lambda site: site.reg_lambda, "{:.3g}".format, axes)


def _corrections(report: summary.Report) -> str:
    sites = [site for site in summary.sites(report) if site.correction_share > 0]
    caption = (
        "One layer of each block also corrects the drift of the hidden states from the original model, by this share: "
        "half of the share that is best on held-out text."
    )
    axes = Axes("block", "share")
    value = "{:.2f}".format
    return _by_depth("Residual error correction", caption, sites, lambda site: site.correction_share, value, axes)


def _by_depth(
    heading: str,
    caption: str,
    sites: Sequence[summary.SiteFacts],
    value: Callable[[summary.SiteFacts], float],
    say: Callable[[float], str],
    axes: Axes,
) -> str:
    """A value by depth; a sentence where it is the same everywhere, which is no plot."""
    if len({value(site) for site in sites}) == 1:
        return section(heading, f"{caption} It is {say(value(sites[0]))} in all {len(sites)} sites.")
    chart = line_chart(_by_kind(sites, value, lambda v: f"{axes.y_label} {say(v)}"), axes)
    return section(heading, caption, figures(chart)) if chart else ""


def _by_kind(
    sites: Sequence[summary.SiteFacts],
    value: Callable[[summary.SiteFacts], float | None],
    say: Callable[[float], str],
) -> list[Series]:
    """A line for each kind, in the order of the run; sites without block or value are left out."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for site in sites:
        number = value(site)
        if site.block is not None and number is not None:
            lines.setdefault(site.kind, []).append((site.block, number, f"{site.name}: {say(number)}"))
    return [Series(kind, tuple(points)) for kind, points in lines.items()]


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
    caption = "On text that stands beside the number, by the same code for the original and the result."
    return section("Quality, measured", caption, table(head, rows, numbers=6)) if rows else ""


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
    caption = (
        f"Starved, with at most a tenth of their layer's median: {', '.join(named[:_NAMED])}{rest}."
        if named
        else "No expert had less than a tenth of its layer's median."
    )
    chart = range_chart(rows, Axes("block", "tokens per expert"))
    return section("Who saw how much text", caption, figures(chart))


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
    return section("The worst ten sites", "By error.", table(head, rows, numbers=5)) if rows else ""


def _fallbacks(report: summary.Report) -> str:
    rows = list(report["fallbacks"].items())
    caption = "Sites that were quantized by RTN instead of solved, and why."
    return section("Fallbacks", caption, table(("site", "reason"), rows)) if rows else ""


# -- what it cost ---------------------------------------------------------------------------------------------------


def _sizes(report: summary.Report) -> str:
    size = report["size"]
    left = size["bytes"] - size["quantized_bytes"]
    rows = [
        ("quantized weights", f"{size['quantized_weights']:,}", summary.human(size["quantized_bytes"])),
        ("everything else, as it was", "", summary.human(left)),
        ("together", "", summary.human(size["bytes"])),
    ]
    if before := report.get("source", {}).get("bytes"):
        rows.append(("the original", "", summary.human(before)))
    caption = f"{size['bits_per_weight']} bits per quantized weight, with scales and zeros."
    return section("Size", caption, table(("", "weights", "size"), rows, numbers=2))


def _time(report: summary.Report) -> str:
    seconds = report["seconds"]
    stages = [*(s for s in _STAGES if s in seconds), *(s for s in seconds if s not in {*_STAGES, "total"})]
    total = max(seconds.get("total", 0.0), sum(seconds[stage] for stage in stages), 1e-9)
    rows = [(stage, duration(seconds[stage]), f"{seconds[stage] / total:.0%}") for stage in stages]
    rest = total - sum(seconds[stage] for stage in stages)
    rows += [("reading, writing, checking", duration(rest), f"{rest / total:.0%}"), ("total", duration(total), "")]
    parts = [table(("stage", "time", "share"), rows, numbers=2)]
    if blocks := report.get("blocks"):
        columns = [(b["index"], [b["seconds"].get(stage, 0.0) for stage in stages]) for b in blocks]
        chart = stacked_bars(columns, stages, Axes("block", "seconds", unit=duration))
        parts = [pair(figures(chart), *parts)]
    memory = ", ".join(f"{name} {summary.human(mib * 2**20)}" for name, mib in report["peak_memory_mib"].items())
    return section("Time and memory", f"Peak memory: {memory}.", *parts)


# -- what was done --------------------------------------------------------------------------------------------------


def _left_alone(report: summary.Report) -> str:
    targets = report["targets"]
    ignored: dict[str, str] = targets.get("ignored", {})
    left: dict[str, str] = targets.get("left", {})
    folded = Counter((star(name), _reason(name, ignored, left)) for name in targets.get("untouched", []))
    rows = [
        (
            name,
            str(count),
            reason or "outside the blocks, or not used by transformers",
        )
        for (name, reason), count in folded.items()
    ]
    caption = f"{targets['quantized']} layers were quantized. Norms stay, embeddings unless included, and these:"
    return section("Left unquantized", caption, table(("layer (* counts)", "how many", "why"), rows))


def _reason(name: str, ignored: Mapping[str, str], left: Mapping[str, str]) -> str:
    return f"ignore pattern {ignored[name]}" if name in ignored else left.get(name, "")


def _settings(report: summary.Report) -> str:
    parts = []
    for heading, key in _SETTINGS.items():
        values = report.get(key)
        if isinstance(values, dict):
            rows = [(name, _plain(value)) for name, value in values.items()]
            parts.append(f"<details><summary>{heading}</summary>{table(('', ''), rows)}</details>")
    caption = f"Model: {report['model']}. On disk: {report.get('format', 'compressed-tensors')}."
    return section("Settings and versions", caption, *parts)


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
