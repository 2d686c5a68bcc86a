"""Write `sarqc/keywords.py`, the keywords that editors and type checkers know, from the fields of the configurations.

python -m tests.support.keywords
"""

from __future__ import annotations

from pathlib import Path

from sarqc.config import QUANTIZE
from sarqc.config_compare import COMPARE, EVALUATE
from sarqc.options import Config, annotations_of

APART = ("method",)
"""Named in the function's own signature, where it may also be a configuration."""
PLACE = Path(__file__).parents[2] / "sarqc" / "keywords.py"
HEAD = '''"""Keywords of public functions, for editors and type checkers. Written by `make keywords`; do not edit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
'''


def source() -> str:
    """The text of the module."""
    classes = [_class(kind) for kind in (*QUANTIZE, *COMPARE, *EVALUATE)]
    unions = [
        f'class {name}({", ".join(map(_name, kinds))}):\n    """Keywords of `sarqc.{function}`."""\n'
        for name, function, kinds in (
            ("QuantizeKeywords", "quantize", QUANTIZE),
            ("CompareKeywords", "compare", COMPARE),
        )
    ]
    return "\n\n".join([HEAD, *classes, *unions])


def _name(kind: type[Config]) -> str:
    return kind.__name__.replace("Config", "Keywords")


def _class(kind: type[Config]) -> str:
    lines = [f"class {_name(kind)}(TypedDict, total=False):", f'    """Fields of `{kind.__name__}`."""', ""]
    lines += [f"    {name}: {type_}" for name, type_ in annotations_of(kind).items() if name not in APART]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PLACE.write_text(source(), encoding="utf-8")
