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

from sarqc._version import __version__
from sarqc.integrations.register import register, unregister

if TYPE_CHECKING:
    from sarqc.config import METHODS, CalibrationConfig, MethodConfig, QuantConfig, RunConfig
    from sarqc.config_compare import ComparisonConfig, MeasureConfig
    from sarqc.entrypoints.compare import Comparison, compare
    from sarqc.entrypoints.estimate import preflight
    from sarqc.entrypoints.evaluate import evaluate
    from sarqc.entrypoints.load import load
    from sarqc.entrypoints.quantize import quantize
    from sarqc.errors import SarqcError
    from sarqc.pipeline.write import Result

_HOME = {
    "METHODS": "sarqc.config",
    "CalibrationConfig": "sarqc.config",
    "Comparison": "sarqc.entrypoints.compare",
    "ComparisonConfig": "sarqc.config_compare",
    "MeasureConfig": "sarqc.config_compare",
    "MethodConfig": "sarqc.config",
    "QuantConfig": "sarqc.config",
    "Result": "sarqc.pipeline.write",
    "RunConfig": "sarqc.config",
    "SarqcError": "sarqc.errors",
    "compare": "sarqc.entrypoints.compare",
    "evaluate": "sarqc.entrypoints.evaluate",
    "load": "sarqc.entrypoints.load",
    "preflight": "sarqc.entrypoints.estimate",
    "quantize": "sarqc.entrypoints.quantize",
}

__all__ = [
    "METHODS",
    "CalibrationConfig",
    "Comparison",
    "ComparisonConfig",
    "MeasureConfig",
    "MethodConfig",
    "QuantConfig",
    "Result",
    "RunConfig",
    "SarqcError",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "preflight",
    "quantize",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sarqc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
