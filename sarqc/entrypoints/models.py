"""Which classes of transformers are quantized: what a tiny model of each ended in, packaged as `sarqc/models.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sarqc.errors import ArgumentError

PACKAGED = Path(__file__).parents[1] / "models.json"


def models(word: str = "") -> dict[str, Any]:
    """The packaged results, as JSON values: `versions`, and `rows` that the word finds in their name or class.

    word: part of a name, or a model (a folder, or OWNER/NAME on a hub), which finds the rows of its class.

    Raises:
        ArgumentError: nothing is found.
        ModelError: the model's configuration cannot be read, or it is none that is quantized.
    """
    table: dict[str, Any] = json.loads(PACKAGED.read_text())
    if word and (Path(word).is_dir() or "/" in word):
        return table | _of_model(word, table["rows"])
    rows = [row for row in table["rows"] if word.lower() in f"{row['name']} {row['class']}".lower()]
    if not rows:
        raise ArgumentError(f"word = {word!r} is in no name of the {len(table['rows'])} models; give a shorter part")
    return table | {"rows": rows}


def _of_model(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from sarqc.model.architecture import read_config
    from sarqc.model.hub import hub_configuration, is_local, locate

    folder = locate(model) if is_local(model) else hub_configuration(model)
    config = read_config(folder, trust_remote_code=False)
    name = next(iter(config.architectures or ()), "")
    same = [row for row in rows if row["class"] == name and "@" not in row["name"]]
    if not same:
        raise ArgumentError(
            f"word = {model!r}: its class {name or 'is not named, which'} is not in the table; "
            f"`sarqc quantize {model} -o OUT --dry-run` reads its configuration"
        )
    return {"model": model, "rows": same}
