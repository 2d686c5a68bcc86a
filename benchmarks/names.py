"""Names that committed results use and that have changed since.

Results are records of what was run, so they keep their words; what is made from them uses today's.
"""

from __future__ import annotations

from typing import Any

from sarqc.methods import OLD_METHODS


def current(results: Any) -> Any:
    """Results as JSON values, with each method under its present name."""
    if isinstance(results, list):
        return [current(value) for value in results]
    if not isinstance(results, dict):
        return results
    renamed = {key: current(value) for key, value in results.items()}
    if isinstance(renamed.get("method"), str):
        renamed["method"] = OLD_METHODS.get(renamed["method"], renamed["method"])
    if isinstance(renamed.get("tools"), dict):
        renamed["tools"] = {OLD_METHODS.get(name, name): tool for name, tool in renamed["tools"].items()}
    return renamed
