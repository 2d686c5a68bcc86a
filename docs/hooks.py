"""What MkDocs runs while it builds the site.

- Formulas become MathML, so that a reader's browser fetches nothing. The extension `pymdownx.arithmatex` marks what
  stands between dollar signs; latex2mathml converts it.
- Markdown files from outside of docs/ become pages; links from one file to another lead to the pages.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
INCLUDED = {
    "contributing.md": "CONTRIBUTING.md",
    "measured/ablations.md": "benchmarks/quality/ABLATIONS.md",
    "measured/mixed.md": "benchmarks/quality/MIXED.md",
    "measured/goals.md": "benchmarks/quality/GOALS.md",
    "measured/scaling.md": "benchmarks/SCALING.md",
    "measured/kernels.md": "benchmarks/NOTES.md",
    "measured/vllm.md": "benchmarks/serve/RESULTS.md",
    "measured/vllm-server.md": "benchmarks/serve/SERVER.md",
}
"""Page -> file whose text it has."""

MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
SOURCE = '<details class="mkdocstrings-source">'
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's source; that of an included file where the page stands for one."""
    source = INCLUDED.get(page.file.src_uri)
    if source is None:
        return markdown
    return including(source, page.file.src_uri)


def including(source: str, page: str) -> str:
    """The text of a file of the repository, with its links to other pages as seen from `page`."""
    pages = {file: name for name, file in INCLUDED.items()}

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        name = pages.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if name is None:
            raise SystemExit(f"{source} links to {target}, which is no page: name the file without a link")
        return f"]({posixpath.relpath(name, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return LINK.sub(linked, (ROOT / source).read_text(encoding="utf-8"))


def on_page_content(html: str, **_: Any) -> str:
    """The page with each marked formula as a <math> element, and sources left out of the search.

    A formula with an error ends the build.
    """
    html = html.replace(SOURCE, SOURCE.replace(">", " data-search-exclude>"))
    return MARKED.sub(_typeset, html)


def _typeset(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    return convert(unescape(match[3]).strip(), display=display)
