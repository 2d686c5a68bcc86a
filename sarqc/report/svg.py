"""Small charts as SVG text: lines, ranges and stacked bars, drawn by a few functions and nothing else.

A chart is one string that stands alone in a page. Colours are CSS variables (`STYLE`), so one drawing serves light and
dark; every mark carries a <title>, which browsers show under the pointer, so that numbers need no script. All text
is escaped: labels come from models that others named. Coordinates are rounded, so equal input gives equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

STYLE = """
svg.chart { --ink: #1c2126; --soft: #68727c; --rule: #e3e6e9; --c0: #1b6ca8; --c1: #cf5a2e; --c2: #24926a;
  --c3: #8a56b4; --c4: #a17200; --c5: #0b8fa6; --c6: #c0407c; --c7: #5d6b78;
  font: 12px system-ui, sans-serif; max-width: 100%; }
@media (prefers-color-scheme: dark) { svg.chart { --ink: #e8ebee; --soft: #9aa5b0; --rule: #343b42; --c0: #62ade4;
  --c1: #f08a5d; --c2: #57c79a; --c3: #bd93e0; --c4: #e0b040; --c5: #4fc3d9; --c6: #ee82b3; --c7: #a3b0bc; } }
svg.chart text { fill: var(--soft); } svg.chart text.ink { fill: var(--ink); }
svg.chart .rule { stroke: var(--rule); } svg.chart .mark { stroke: var(--soft); stroke-dasharray: 4 3; }
"""
"""What the charts need in the page they stand in, or in themselves where they stand alone (`sheet`)."""

COLOURS = 8
_DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT = 440, 250
"""Pixels of a chart without its legend: two beside each other fill a page, and one a telephone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 20, 42
_LINE, _LABEL = 18, 24

Kind = Literal["linear", "log", "count"]


@dataclass(frozen=True)
class Series:
    """A line: its label and its points (x, y, tooltip). Points that are not finite break it.
    spans: (x, low, high), thin upright lines that say how sure a point is."""

    label: str
    points: tuple[tuple[float, float, str], ...]
    spans: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Scale:
    """Numbers low .. high to pixels start .. stop. "count" is log(1 + n), which has a place for zero."""

    low: float
    high: float
    start: float
    stop: float
    kind: Kind = "linear"

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (_bent(number, self.kind) for number in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """About five round values inside."""
        if self.kind == "linear":
            return _round_steps(self.low, self.high)
        first, last = (math.floor(math.log10(max(v, 1e-12))) for v in (max(self.low, 1e-12), self.high))
        first = max(first, 0) if self.kind == "count" else first
        step = 1 + (last - first) // 6
        fine = (1, 2, 5) if self.high < 40 * self.low else (1,)
        ticks = [m * 10.0**e for e in range(first, last + 1, step) for m in fine]
        ticks = [0.0, *ticks] if self.kind == "count" else ticks
        inside = [value for value in ticks if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]
        return inside if len(inside) > 1 else _round_steps(self.low, self.high)


def text(value: str) -> str:
    """Any string as text of a page or a drawing: escaped, and what cannot be seen (controls, lone surrogates, marks
    that turn the direction of writing) as a space."""
    return escape("".join(letter if letter.isprintable() else " " for letter in value))


def short(value: float) -> str:
    """A number in at most four digits: 0.003, 1.25, 18 k."""
    if not math.isfinite(value):
        return "?"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Axes:
    """Labels and scales of a chart.

    Attributes:
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        kind: Scale of the vertical axis.
        x_kind: Scale of the horizontal axis.
        x_ticks: Ticks of the horizontal axis; whole numbers by default.
        unit: Writes a value of the vertical axis.
    """

    x_label: str
    y_label: str
    kind: Kind = "linear"
    x_kind: Kind = "linear"
    x_ticks: Sequence[float] | None = None
    unit: Callable[[float], str] = short


def line_chart(
    series: Sequence[Series],
    axes: Axes,
    *,
    mark: tuple[float, str] | None = None,
    title: str = "",
) -> str:
    """Lines with points over a common x. mark: a horizontal line to compare with, and its label."""
    kind = axes.kind
    ends = [[p[1] for p in s.points if _drawable(p[1], kind)] for s in series]
    xs = [x for s in series for x, at, _ in s.points if _drawable(at, kind)]
    ys = [at for values in ends for at in values]
    ys += [at for s in series for span in s.spans for at in span[1:] if _drawable(at, kind)]
    if not xs:
        return ""
    x = Scale(min(xs), max(xs), _LEFT + 6, WIDTH - _RIGHT - 6, axes.x_kind)
    y = _y_scale([*ys, mark[0]] if mark else ys, kind)
    parts = _grid(x, y, axes)
    if mark:
        at = y(mark[0])
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{WIDTH - _RIGHT - 4}" y="{at - 4:.1f}" text-anchor="end">{text(mark[1])}</text>')
    for index, s in enumerate(series):
        parts += _line(s, index, x, y, kind)
    order = sorted(range(len(series)), key=lambda i: y(ends[i][-1]) if ends[i] else math.inf)
    legend = _legend([(series[i].label, i) for i in order])
    what = f"{title}: {axes.y_label}" if title else axes.y_label
    about = f"{what} by {axes.x_label}, from {axes.unit(min(ys))} to {axes.unit(max(ys))}, for {_listed(series)}"
    return _svg([*parts, *legend], HEIGHT + _rows_of(len(series)) * _LINE, about, title=title)


def range_chart(rows: Sequence[tuple[float, float, float, float, str]], axes: Axes) -> str:
    """At each x the span from low to high with a dot at the middle: rows (x, low, middle, high, what it says)."""
    x = Scale(rows[0][0], rows[-1][0], _LEFT + 8, WIDTH - _RIGHT - 8)
    values = [value for row in rows for value in row[1:4]]
    y = _y_scale(values, "linear" if 20 * min(values) > max(values) else "count")
    parts = _grid(x, y, axes)
    for at, low, middle, high, tooltip in rows:
        px = x(at)
        parts.append(
            f'<g style="stroke:var(--c0)" fill="var(--c0)"><title>{text(tooltip)}</title>'
            f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke-width="5" opacity=".35"/>'
            f'<circle cx="{px:.1f}" cy="{y(middle):.1f}" r="3.5"/></g>'
        )
    parts.append(f'<text x="{_LEFT}" y="{HEIGHT + 8}" class="ink">bar: least to most; dot: median</text>')
    about = f"{axes.y_label} by {axes.x_label}, from {axes.unit(min(values))} to {axes.unit(max(values))}"
    return _svg(parts, HEIGHT + _LINE, about)


def stacked_bars(columns: Sequence[tuple[float, Sequence[float]]], labels: Sequence[str], axes: Axes) -> str:
    """A bar for each column (x, a part for each label), parts on top of each other."""
    x = Scale(columns[0][0] - 0.5, columns[-1][0] + 0.5, _LEFT, WIDTH - _RIGHT)
    y = _y_scale([0.0, *(sum(parts) for _, parts in columns)], "linear")
    bar = max(min((WIDTH - _LEFT - _RIGHT) / len(columns) * 0.8, 40), 1)
    drawn = _grid(x, y, axes)
    for at, parts in columns:
        base = 0.0
        for index, part in enumerate(parts):
            top, bottom = y(base + part), y(base)
            base += part
            tooltip = text(f"{axes.x_label} {short(at)}, {labels[index]}: {axes.unit(part)}")
            drawn.append(
                f'<rect x="{x(at) - bar / 2:.1f}" y="{top:.1f}" width="{bar:.1f}" height="{bottom - top:.1f}" '
                f'fill="var(--c{index % COLOURS})"><title>{tooltip}</title></rect>'
            )
    drawn += _legend([(label, index) for index, label in enumerate(labels)])
    most = max(sum(parts) for _, parts in columns)
    about = f"{axes.y_label} by {axes.x_label}, up to {axes.unit(most)}, in parts: {', '.join(labels)}"
    return _svg(drawn, HEIGHT + _rows_of(len(labels)) * _LINE, about)


@dataclass(frozen=True)
class Ranked:
    """A row of `ranked_chart`. span: from the lowest to the highest, where it was measured several times.
    value_text: the value as it is written. best: whether it stands out."""

    label: str
    value: float
    value_text: str
    span: tuple[float, float] | None = None
    best: bool = False


def ranked_chart(rows: Sequence[Ranked], x_label: str, *, mark: tuple[float, str], title: str = "") -> str:
    """A line for each row with a dot at its value, on a log scale. mark: an upright line to compare with."""
    rows = [row for row in rows if _drawable(row.value, "log")]
    if not rows:
        return ""
    ends = [mark[0], *(at for row in rows for at in (row.value, *(row.span or ())) if _drawable(at, "log"))]
    left, right, step = 150, WIDTH - 116, 26
    top = _TOP + (20 if title else 8)
    bottom = top + 8 + step * len(rows)
    room = max((max(ends) / min(ends)) ** 0.06, 1.01)
    x = Scale(min(ends) / room, max(ends) * room, left, right, "log")
    parts = []
    for tick in x.ticks():
        parts.append(f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{text(short(tick))}</text>')
    at = x(mark[0])
    parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
    parts.append(f'<text x="{at:.1f}" y="{top - 4}" text-anchor="start">{text(mark[1])}</text>')
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{text(x_label)}</text>')
    for index, row in enumerate(rows):
        y, colour = top + 4 + step * (index + 0.5), "var(--c0)" if row.best else "var(--c7)"
        heavy = ' font-weight="600"' if row.best else ""
        low, high = row.span or (row.value, row.value)
        name = text(_clipped(row.label, 22))
        parts.append(
            f'<text class="ink"{heavy} x="{left - 10}" y="{y + 4:.0f}" text-anchor="end">{name}</text>'
            f'<line x1="{x(mark[0]):.1f}" x2="{x(row.value):.1f}" y1="{y:.0f}" y2="{y:.0f}" '
            f'style="stroke:{colour}" stroke-width="2" opacity=".45"/>'
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.0f}" y2="{y:.0f}" style="stroke:{colour}" '
            f'stroke-width="6" opacity=".45"/><circle cx="{x(row.value):.1f}" cy="{y:.0f}" r="5" fill="{colour}">'
            f"<title>{text(f'{row.label}: {row.value_text}')}</title></circle>"
            f'<text class="ink"{heavy} x="{right + 12}" y="{y + 4:.0f}">{text(row.value_text)}</text>'
        )
    description = ", ".join(f"{row.label} {row.value_text}" for row in rows)
    about = f"{title}: {x_label}. {mark[1]} {short(mark[0])}, {description}" if title else description
    return _svg(parts, bottom + 44, about, title=title)


def sheet(charts: Sequence[str], *, columns: int) -> str:
    """Charts row by row in a file of their own, with the style and a background."""
    sizes = [float(chart.partition(' height="')[2].partition('"')[0]) for chart in charts]
    height, used = math.ceil(max(sizes)), min(columns, len(charts))
    placed = [
        chart.replace("<svg ", f'<svg x="{index % columns * WIDTH}" y="{index // columns * height}" ', 1)
        for index, chart in enumerate(charts)
    ]
    style = f"<style>:root {{ color-scheme: light dark; }}{STYLE}</style>"
    back = '<rect width="100%" height="100%" fill="Canvas"/>'
    rows = -(-len(charts) // columns)
    return _svg([style, back, *placed], rows * height, f"{len(charts)} charts", used * WIDTH) + "\n"


def _bent(value: float, kind: Kind) -> float:
    return value if kind == "linear" else math.log(value) if kind == "log" else math.log1p(max(value, 0.0))


def _drawable(value: float, kind: Kind) -> bool:
    return math.isfinite(value) and (kind != "log" or value > 0)


def _y_scale(values: Sequence[float], kind: Kind) -> Scale:
    low, high = min(values), max(values)
    if kind == "log":
        room = max((high / low) ** 0.06, 1.01)
        low, high = low / room, high * room
    elif kind == "count":
        low = 0.0
    else:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if low >= 0 and low < 0.5 * high else low - room), high + room
    return Scale(low, high, HEIGHT - _BOTTOM, _TOP + 8, kind)


def _round_steps(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _whole(ticks: Sequence[float]) -> list[float]:
    """Only whole numbers: blocks have no halves."""
    return [tick for tick in ticks if tick == int(tick)]


def _grid(x: Scale, y: Scale, axes: Axes) -> list[str]:
    left, right, bottom = _LEFT, WIDTH - _RIGHT, y.start
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="rule" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{text(axes.unit(tick))}</text>')
    for tick in axes.x_ticks or _whole(x.ticks()):
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{text(short(tick))}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 33:.1f}" text-anchor="middle">{text(axes.x_label)}</text>')
    centre = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(12 {centre:.1f}) rotate(-90)" text-anchor="middle">{text(axes.y_label)}</text>'
    )
    return parts


def _line(s: Series, index: int, x: Scale, y: Scale, kind: Kind) -> list[str]:
    colour = f"var(--c{index % COLOURS})"
    dash = _DASHES[index // COLOURS % len(_DASHES)]
    parts = []
    for whole, run in groupby(s.points, key=lambda point: _drawable(point[1], kind)):
        if whole:
            path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _ in run)
            parts.append(
                f'<polyline points="{path}" fill="none" style="stroke:{colour}" stroke-width="1.8" '
                f'stroke-dasharray="{dash}"/>'
            )
    for at, low, high in s.spans:
        if _drawable(low, kind) and _drawable(high, kind):
            middle = f"{x(at):.1f}"
            parts.append(
                f'<line x1="{middle}" x2="{middle}" y1="{y(low):.1f}" y2="{y(high):.1f}" '
                f'style="stroke:{colour}" opacity=".6"/>'
            )
    radius = 2.6 if len(s.points) <= 60 else 1.6
    for px, py, tooltip in s.points:
        if _drawable(py, kind):
            parts.append(
                f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="{radius}" fill="{colour}">'
                f"<title>{text(tooltip)}</title></circle>"
            )
    return parts


def _rows_of(count: int) -> int:
    """Rows of a legend in two columns."""
    return -(-count // 2)


def _legend(labels: Sequence[tuple[str, int]]) -> list[str]:
    """Below the chart, in two columns."""
    parts, half = [], (WIDTH - _LEFT) // 2
    for number, (label, index) in enumerate(labels):
        column, row = divmod(number, _rows_of(len(labels)))
        left, at = _LEFT + column * half, HEIGHT + 4 + _LINE * row
        parts.append(
            f'<line x1="{left}" x2="{left + 16}" y1="{at}" y2="{at}" style="stroke:var(--c{index % COLOURS})" '
            f'stroke-width="3" stroke-dasharray="{_DASHES[index // COLOURS % len(_DASHES)]}"/><text class="ink" '
            f'x="{left + 22}" y="{at + 4}"><title>{text(label)}</title>{text(_clipped(label, _LABEL))}</text>'
        )
    return parts


def _clipped(label: str, most: int) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"  # names differ at their ends


def _listed(series: Sequence[Series]) -> str:
    """Their labels, or how many there are."""
    return ", ".join(s.label for s in series) if len(series) <= COLOURS else f"{len(series)} lines"


def _svg(parts: Sequence[str], height: float, label: str, width: int = WIDTH, title: str = "") -> str:
    """The drawing; `label` is what is read out in its place, `title` stands above it."""
    above = f'<text class="ink" x="4" y="{_TOP - 6}">{text(title)}</text>' if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{text(label)}">{above}{"".join(parts)}</svg>'
    )
