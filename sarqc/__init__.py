"""SARQC: post-training weight quantization that generalises.

    import sarqc
    result = sarqc.quantize("smollm2", "out")      # a low-bit checkpoint in compressed-tensors form
    model, tokenizer = sarqc.load("out")           # and that runs here
    sarqc.evaluate("out").perplexity               # what it cost

    AutoModelForCausalLM.from_pretrained("out")    # transformers keeps it packed too, once sarqc is imported

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sarqc.registration import register, unregister

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sarqc.errors import SarqcError
    from sarqc.job.comparison.compare import Comparison, compare
    from sarqc.job.export import Result, export
    from sarqc.job.forecast.preflight import preflight
    from sarqc.job.load import load
    from sarqc.job.measure import evaluate
    from sarqc.job.run import quantize
    from sarqc.spec import METHODS, QuantSpec, SolveSpec

__all__ = [
    "METHODS",
    "Comparison",
    "QuantSpec",
    "Result",
    "SarqcError",
    "SolveSpec",
    "compare",
    "evaluate",
    "export",
    "load",
    "preflight",
    "quantize",
    "register",
    "unregister",
]

_HOME = {
    "METHODS": "sarqc.spec",
    "Comparison": "sarqc.job.comparison.compare",
    "QuantSpec": "sarqc.spec",
    "Result": "sarqc.job.export",
    "SarqcError": "sarqc.errors",
    "SolveSpec": "sarqc.spec",
    "compare": "sarqc.job.comparison.compare",
    "evaluate": "sarqc.job.measure",
    "export": "sarqc.job.export",
    "load": "sarqc.job.load",
    "preflight": "sarqc.job.forecast.preflight",
    "quantize": "sarqc.job.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sarqc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
