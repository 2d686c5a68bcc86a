"""What pages are made of: one document with its style, sections, figures, tiles and tables. No script, no network.

Figures stand beside each other where there is room for two. Below 34 rem a row of a wide table becomes a list of its
cells, each with the heading of its column, so that nothing has to be scrolled sideways.
"""

from __future__ import annotations

from collections.abc import Sequence

from sarqc.report.svg import STYLE, text

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1c2126; --dim: #5c6670; --edge: #e3e6e9;
  --good: #1d7f5a; --look: #a84c14; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --text: #e8ebee; --dim: #9aa5b0;
  --edge: #343b42; --good: #57c79a; --look: #f0a05d; } }
* { box-sizing: border-box } body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem;
  background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; font-weight: 500; color: var(--dim); margin: 0 }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem }
p { margin: .2rem 0 .6rem; max-width: 46rem } .dim { color: var(--dim) }
.verdict { font-size: 1.45rem; line-height: 1.35; font-weight: 600; margin: .35rem 0 .6rem; border-left: 5px solid;
  padding-left: .8rem } .good { border-color: var(--good) } .look { border-color: var(--look) }
ul { margin: .3rem 0; padding-left: 1.2rem } .concerns { color: var(--look) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .7rem; margin: 1.2rem 0 }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .6rem .8rem }
.tile b { display: block; font-size: 1.2rem; font-weight: 600; line-height: 1.3 }
.tile span { color: var(--dim); font-size: .85rem }
.figures, .pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
  gap: .8rem; margin: .6rem 0 } .pair { column-gap: 1.4rem; align-items: start } .pair h2 { margin-top: 1.6rem }
figure { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: .7rem .7rem .3rem } figure svg { display: block; width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .4rem 0 }
td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--edge);
  font-weight: 400 } th { color: var(--dim) } tr.best td { font-weight: 600 }
.number { text-align: right; font-variant-numeric: tabular-nums } td.number { white-space: nowrap }
details { margin: .4rem 0 } summary { cursor: pointer; color: var(--dim) }
@media (max-width: 34rem) { body { padding: 1.2rem .9rem 3rem } .verdict { font-size: 1.25rem }
  .wide thead { display: none } .wide tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--edge) }
  .wide td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; text-align: right }
  .wide td::before { content: attr(data-label); color: var(--dim); text-align: left; font-weight: 400 }
  .wide td:empty { display: none } .wide td:first-child { font-weight: 600 } }
"""
WIDE = 3
"""Columns from which on a table is wide."""


def document(title: str, header: str, sections: Sequence[str]) -> str:
    """A page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}{STYLE}</style></head><body>\n<header>{header}</header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def headline(name: str, sentence: str, good: bool, concerns: Sequence[str] = ()) -> str:
    """What the page is about, and what a person should take away."""
    points = "".join(f"<li>{text(concern)}</li>" for concern in concerns)
    return f'<h1>{text(name)}</h1>\n<p class="verdict {"good" if good else "look"}">{text(sentence)}</p>' + (
        f'<ul class="concerns">{points}</ul>' if points else ""
    )


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """Numbers, each with what it is."""
    cells = (f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in numbers)
    return f'\n<div class="tiles">{"".join(cells)}</div>'


def section(heading: str, caption: str, *parts: str) -> str:
    """A heading, a sentence or two, and what follows."""
    return f'<section><h2>{text(heading)}</h2><p class="dim">{text(caption)}</p>{"".join(parts)}</section>'


def figures(*charts: str) -> str:
    """Charts beside each other where there is room; empty ones are left out."""
    return f'<div class="figures">{"".join(f"<figure>{chart}</figure>" for chart in charts if chart)}</div>'


def pair(*parts: str) -> str:
    """Sections or tables beside each other where there is room; empty ones are left out."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>' if any(parts) else ""


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0, best: Sequence[bool] | None = None
) -> str:
    """A table whose last `numbers` columns are numbers. best: rows to stand out."""
    first, marks = len(head) - numbers, best or [False] * len(rows)

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(map(cell, [tag] * len(cells), range(len(cells)), cells))

    def cell(tag: str, index: int, content: str) -> str:
        kind = ' class="number"' if index >= first else ""
        label = f' data-label="{text(head[index])}"' if tag == "td" and head[index] else ""
        return f"<{tag}{kind}{label}>{text(content)}</{tag}>"

    top = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    opened = ('<tr class="best">' if mark else "<tr>" for mark in marks)
    body = "".join(f"{tag}{line(row, 'td')}</tr>" for tag, row in zip(opened, rows))
    wide = ' class="wide"' if len(head) > WIDE else ""
    return f"<table{wide}>{top}<tbody>{body}</tbody></table>"
