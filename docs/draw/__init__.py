"""The pictures of these pages: python -m docs.draw writes docs/img/*.svg.

What they show is computed, or read from the committed results; a test holds the files to what is drawn here.
"""

from __future__ import annotations

from collections.abc import Callable

from docs.draw.kernels import columns, gram, tiles
from docs.draw.method import flow, objective, perplexity, quality

PICTURES: dict[str, Callable[[], str]] = {
    "perplexity": perplexity,
    "objective": objective,
    "flow": flow,
    "quality": quality,
    "gram": gram,
    "columns": columns,
    "tiles": tiles,
}
"""Name of a file in docs/img/ -> what makes its text."""
