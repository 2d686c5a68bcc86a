"""A dry run: what `sarqc.quantize` would do and take, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sarqc.estimation.preflight import Preflight, look_ahead
from sarqc.pipeline.plan import expected_windows, make_plan, settings_of
from sarqc.pipeline.resume import default_work


def preflight(
    model: str | Path, out: str | Path = "out", *, work: str | Path | None = None, **settings: Any
) -> Preflight:
    """What `sarqc.quantize` with these arguments would do, without doing it.

    model may be a hub id, of which only headers are fetched, or a folder with a config.json and no weights. Raises
    `SarqcError` where the settings do not fit the model; what this machine lacks is in `problems`.
    """
    plan = make_plan(model, settings_of(**settings), headers_only=True)
    out = Path(out).expanduser()
    place = default_work(out) if work is None else Path(work).expanduser()
    return look_ahead(plan, expected_windows(plan), out, place)
