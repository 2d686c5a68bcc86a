"""An SVG as lines of text: shapes go in, the same text comes out on every machine.

Pictures have a card of their own behind them, so that they can be read on any page; it is dark where the reader's
system is. Lengths are user units; the page scales them to its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, FAINT, PAPER = "#263238", "#90a4ae", "#ffffff"
BLUE, PALE_BLUE, ORANGE, PALE_ORANGE, GREEN, GREY = "#1565c0", "#bbdefb", "#e65100", "#ffe0b2", "#2e7d32", "#eceff1"

DARK = "@media (prefers-color-scheme: dark) { #picture { filter: invert(0.88) hue-rotate(180deg); } }"

Point = tuple[float, float]


class Canvas:
    """A picture of `width` by `height`; what is added later lies on top. title: what it shows, for screen readers."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f"<style>{DARK}</style>",
            '<g id="picture">',
            f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def rect(self, at: Point, size: Point, fill: str = "none", stroke: str = INK, width: float = 1) -> None:
        """A rectangle from its upper left corner."""
        self.parts.append(
            f'<rect x="{at[0]:g}" y="{at[1]:g}" width="{size[0]:g}" height="{size[1]:g}" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="{width:g}"/>'
        )

    def text(self, at: Point, words: str, fill: str = INK, anchor: str = "start", size: float = 13) -> None:
        """One line of text on a base line; anchor: start, middle or end."""
        self.parts.append(
            f'<text x="{at[0]:g}" y="{at[1]:g}" fill="{fill}" text-anchor="{anchor}" font-size="{size:g}">'
            f"{escape(words)}</text>"
        )

    def lines(
        self, points: Sequence[Point], stroke: str = INK, width: float = 1, dash: str = "", fill: str = "none"
    ) -> None:
        """A line through points."""
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{path}" fill="{fill}" stroke="{stroke}" stroke-width="{width:g}"{dashed}/>'
        )

    def dot(self, at: Point, radius: float, fill: str = INK) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{at[0]:.2f}" cy="{at[1]:.2f}" r="{radius:g}" fill="{fill}"/>')

    def arrow(self, start: Point, stop: Point, stroke: str = INK, width: float = 1.5) -> None:
        """A straight line with a head at `stop`."""
        length = ((stop[0] - start[0]) ** 2 + (stop[1] - start[1]) ** 2) ** 0.5
        along = ((stop[0] - start[0]) / length, (stop[1] - start[1]) / length)
        back = (stop[0] - 9 * along[0], stop[1] - 9 * along[1])
        sides = [(back[0] - 4 * s * along[1], back[1] + 4 * s * along[0]) for s in (1, -1)]
        self.lines([start, back], stroke, width)
        head = " ".join(f"{x:.2f},{y:.2f}" for x, y in (stop, *sides))
        self.parts.append(f'<polygon points="{head}" fill="{stroke}"/>')

    def svg(self) -> str:
        """The file's text."""
        return "\n".join([*self.parts, "</g>", "</svg>", ""])
