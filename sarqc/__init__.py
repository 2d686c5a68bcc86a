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
    from sarqc.cli.terminal import progress_bar
    from sarqc.config import METHODS, CalibrationConfig, MethodConfig, QuantConfig, RunConfig
    from sarqc.config_compare import ComparisonConfig, EvaluationConfig, MeasureConfig
    from sarqc.entrypoints.compare import Comparison, compare
    from sarqc.entrypoints.convert import convert
    from sarqc.entrypoints.estimate import estimate as estimate
    from sarqc.entrypoints.evaluate import evaluate
    from sarqc.entrypoints.generate import generate
    from sarqc.entrypoints.load import load
    from sarqc.entrypoints.push import push
    from sarqc.entrypoints.quantize import quantize
    from sarqc.entrypoints.verify import verify
    from sarqc.errors import ArgumentError, SarqcError
    from sarqc.method.awq import Scaling
    from sarqc.method.gram import Gram
    from sarqc.method.hessian import Objective
    from sarqc.method.layer import Solver
    from sarqc.method.register import register_solver
    from sarqc.method.rtn import Solution
    from sarqc.method.weight import QuantizedWeight
    from sarqc.report.result import LayerResult, Result

_ROOMS = {
    "cli.terminal": ("progress_bar",),
    "config": ("METHODS", "CalibrationConfig", "MethodConfig", "QuantConfig", "RunConfig"),
    "config_compare": ("ComparisonConfig", "EvaluationConfig", "MeasureConfig"),
    "entrypoints.compare": ("Comparison", "compare"),
    "entrypoints.convert": ("convert",),
    "entrypoints.estimate": ("estimate",),
    "entrypoints.evaluate": ("evaluate",),
    "entrypoints.generate": ("generate",),
    "entrypoints.load": ("load",),
    "entrypoints.push": ("push",),
    "entrypoints.quantize": ("quantize",),
    "entrypoints.verify": ("verify",),
    "errors": ("ArgumentError", "SarqcError"),
    "method.awq": ("Scaling",),
    "method.gram": ("Gram",),
    "method.hessian": ("Objective",),
    "method.layer": ("Solver",),
    "method.register": ("register_solver",),
    "method.rtn": ("Solution",),
    "method.weight": ("QuantizedWeight",),
    "report.result": ("LayerResult", "Result"),
}
_HOME = {name: f"sarqc.{module}" for module, names in _ROOMS.items() for name in names}
"""Public name -> its module."""
_OLD = {"QuantSpec": "QuantConfig", "SolveSpec": "MethodConfig", "preflight": "estimate"}
"""Earlier names, which still work in this minor version."""

__all__ = [
    "METHODS",
    "ArgumentError",
    "CalibrationConfig",
    "Comparison",
    "ComparisonConfig",
    "EvaluationConfig",
    "Gram",
    "LayerResult",
    "MeasureConfig",
    "MethodConfig",
    "Objective",
    "QuantConfig",
    "QuantizedWeight",
    "Result",
    "RunConfig",
    "SarqcError",
    "Scaling",
    "Solution",
    "Solver",
    "__version__",
    "compare",
    "convert",
    "estimate",
    "evaluate",
    "generate",
    "load",
    "progress_bar",
    "push",
    "quantize",
    "register",
    "register_solver",
    "unregister",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _OLD:
        from sarqc.options import warn_renamed

        warn_renamed(f"sarqc.{name}", f"sarqc.{_OLD[name]}")
        name = _OLD[name]
    if name not in _HOME:
        raise AttributeError(f"module 'sarqc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
