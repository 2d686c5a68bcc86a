"""Committed tables of measured choices: `sarqc_kernels/<op>/tuned/sm_<arch>.json`, written by `benchmarks.tune`.

`config.choose` of an operation stays a pure function: of the call's shape, of the card, and of this data, which comes
with the package and does not change while a program runs. No table, or no entry for a shape: the rule decides. Shapes
share an entry by powers of two, so a table stays small enough to read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarqc_kernels.errors import BackendError

__all__ = ["bucket", "choices", "table_path"]

HERE = Path(__file__).parent


def bucket(size: int) -> int:
    """The least power of two that is not below `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def table_path(op: str, arch: int) -> Path:
    """Where the table of an operation lies for capability arch / 10; need not exist."""
    return HERE / op / "tuned" / f"sm_{arch}.json"


@functools.cache
def choices(op: str, arch: int) -> Mapping[str, Mapping[str, Any]]:
    """What to take, by an operation's own keys; empty without a table. Raises BackendError for one that is broken."""
    path = table_path(op, arch)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["choices"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{path} is no table of benchmarks.tune: remove it or reinstall ({error})") from error
    if not isinstance(table, dict):
        raise BackendError(f"{path} is no table of benchmarks.tune: remove it or reinstall")
    return table
