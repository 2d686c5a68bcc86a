"""What the numbers of a report say: the verdict, the sites by kind and depth, the experts that saw too little.

Reads plain JSON values and asks for nothing that an older report lacks. The page, the model card and the command line
all speak from here, so that they never disagree.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARVED = 0.1
"""An expert is starved below this share of the median tokens of its layer."""
HARMED = 1.05
"""A site is harmed where its error is more than this times that of RTN."""

Report = dict[str, Any]
_SHARE = re.compile(r"^(.*)\[(\d+):(\d+)\]$")


@dataclass(frozen=True)
class SiteFacts:
    """One site. block: index of its decoder block, None where its name has none. kind: its name inside the block.
    loss: error / error of RTN, None where that is zero. correction_share, bits: 0 in reports that lack them."""

    name: str
    block: int | None
    kind: str
    error: float
    rtn_error: float
    loss: float | None
    reg_lambda: float
    correction_share: float
    bits: int
    rows: tuple[int, ...]
    record: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """good: there are no concerns. sentence: the summary of the run. concerns: what to look at."""

    good: bool
    sentence: str
    concerns: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """Tokens per expert of one layer of experts. starved: (expert, tokens) below a tenth of the median."""

    site: str
    block: int
    rows: tuple[int, ...]
    starved: tuple[tuple[int, int], ...]

    @property
    def median(self) -> float:
        """Median over experts."""
        return statistics.median(self.rows)


def sites(report: Report) -> list[SiteFacts]:
    """Every solve of the run, in its order."""
    return [_site(record) for record in report["sites"]]


def place(name: str) -> tuple[int | None, str]:
    """Block index and kind of a site's name: "model.layers.3.mlp.experts.0.w1[0:8]" -> 3, "mlp.experts.w1"."""
    bare = _SHARE.sub(r"\1", name)
    parts = bare.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 7), None)
    if at is None:
        return None, bare
    return int(parts[at]), ".".join(part for part in parts[at + 1 :] if not part.isdecimal()) or bare


def loads(report: Report) -> list[Load]:
    """Tokens per expert, layer by layer; both projections of a layer see the same, so one stands for it."""
    rows: dict[tuple[int, str], dict[int, int]] = {}
    for site in sites(report):
        split = _SHARE.match(site.name)
        if site.block is None or (len(site.rows) < 2 and not split):
            continue
        first = int(split.group(2)) if split else 0
        name = split.group(1) if split else site.name
        rows.setdefault((site.block, name), {}).update({first + i: count for i, count in enumerate(site.rows)})
    by_place: dict[tuple[int, tuple[int, ...]], Load] = {}
    for (block, name), counts in rows.items():
        ordered = tuple(counts[expert] for expert in sorted(counts))
        floor = STARVED * statistics.median(ordered)
        starved = tuple((expert, counts[expert]) for expert in sorted(counts) if counts[expert] <= floor)
        by_place.setdefault((block, ordered), Load(name, block, ordered, starved))
    return list(by_place.values())


def worst(report: Report, count: int = 10) -> list[SiteFacts]:
    """The sites with the largest error."""
    return sorted(sites(report), key=lambda site: site.error, reverse=True)[:count]


def width(quant: dict[str, Any]) -> str:
    """Bits of the weights in words; those of an average count scales."""
    average = quant.get("avg_bits")
    return f"{quant['bits']} bits" if average is None else f"{average:g} bits on average"


def settings(report: Report) -> str:
    """Effort and lambda of the run, as words behind the name of its method."""
    effort, reg_lambda = report.get("effort"), report["method"].get("reg_lambda")
    return (f", effort {effort}" if effort else "") + (f", lambda {reg_lambda}" if reg_lambda else "")


def figure(perplexity: float, spread: float | None = None) -> str:
    """A perplexity, ± its spread if known, in two decimals, or in none where it is in the thousands."""
    form = ".2f" if perplexity < 1000 else ",.0f"
    return " ± ".join(format(value, form) for value in (perplexity, spread) if value is not None)


def share(value: float) -> str:
    """A share in percent, three digits of it or what stands before the point."""
    return f"{100 * value:.3g}%" if value < 9.99 else f"{100 * value:.0f}%"


def text_name(text: str) -> str:
    """What a text is called: a file without the path to it, a data set by its whole name."""
    is_file = ":" not in text and (bool(Path(text).suffix) or text.startswith(("/", ".", "~")))
    return text.rpartition("/")[2] if is_file else text


def human(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def serves(report: Report, server: str) -> bool | None:
    """Whether a server, `vLLM` or `SGLang`, has kernels for all layers; None where the report does not know."""
    support = report.get("serve")
    ranks = [
        ranks_of for name, ranks_of in (support if isinstance(support, dict) else {}).items() if name.startswith(server)
    ]
    return None if not ranks or None in ranks else any(ranks)


def calibrated(report: Report) -> bool:
    """Whether the run used calibration data."""
    return bool(report["calibration"])


def gain(report: Report) -> float | None:
    """How many times smaller than RTN's the error is; None where either is zero."""
    error, plain = report["error"], report["rtn_error"]
    return plain / error if error > 0 and plain > 0 else None


def verdict(report: Report) -> Verdict:
    """The run in a sentence, and its concerns."""
    concerns = _concerns(report)
    quant = report["quant"]
    what = f"{width(quant)} by {report['method']['method']}"
    error, plain = share(report["error"]), share(report["rtn_error"])
    if not calibrated(report):
        sentence = f"{what}, without calibration; weight error {error}"
    elif (times := gain(report)) is None:
        sentence = f"{what}; output error {error}, RTN {plain}"
    elif times >= 1:
        sentence = f"{what}; output error {error}, {times:.1f} times smaller than RTN's {plain}"
    else:
        sentence = f"{what}; output error {error}, larger than RTN's {plain}"
    after = [entry for entry in report.get("quality", []) if entry.get("before")]
    if after:
        kept = max(after, key=lambda entry: entry["after"] / entry["before"])
        sentence += f"; perplexity {figure(kept['before'])} → {figure(kept['after'])}"
    opening = "It went well" if not concerns else "Look closer"
    return Verdict(not concerns, f"{opening}: {sentence}.", tuple(concerns))


def _concerns(report: Report) -> list[str]:
    concerns = []
    if fallbacks := len(report["fallbacks"]):
        concerns.append(f"{counted(fallbacks, 'site')} fell back to RTN")
    if calibrated(report):
        harmed = [s for s in sites(report) if s.loss is not None and s.loss > HARMED]
        if harmed:
            first = max(harmed, key=lambda site: site.loss or 0.0)
            concerns.append(f"{counted(len(harmed), 'site')} lost more than RTN would, most {first.name}")
    unseen = sum(count == 0 for load in loads(report) for count in load.rows)
    if unseen:
        concerns.append(f"{counted(unseen, 'expert')} received no token: use more or other calibration data")
    for entry in report.get("quality", []):
        if entry.get("before") and entry["after"] > 1.25 * entry["before"]:
            concerns.append(f"perplexity rose by {entry['after'] / entry['before'] - 1:.0%} on {entry['text']}")
    return concerns


def _site(record: dict[str, Any]) -> SiteFacts:
    block, kind = place(record["site"])
    plain = record["rtn_error"]
    return SiteFacts(
        name=record["site"],
        block=block,
        kind=kind,
        error=record["error"],
        rtn_error=plain,
        loss=record["error"] / plain if plain > 0 else None,
        reg_lambda=record["reg_lambda"],
        correction_share=record.get("correction_share", 0.0),
        bits=record.get("bits", 0),
        rows=tuple(record["rows"]),
        record=record,
    )
