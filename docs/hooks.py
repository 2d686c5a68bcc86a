"""Formulas as MathML: a hook of MkDocs that runs while the site is built, so that a reader's browser fetches nothing.

The extension `pymdownx.arithmatex` marks what stands between dollar signs; latex2mathml turns it into MathML.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """The page with each marked formula as a <math> element; a formula with an error ends the build."""
    return MARKED.sub(_typeset, html)


def _typeset(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return convert(unescape(found[3]).strip(), display=display)
