"""Blocks of a model quantized in tests, with options of the execution by keyword."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from sarqc.pipeline import driver
from sarqc.pipeline.execution import Execution


def run_blocks(*model_and_method: Any, start: Any = None, **options: Any) -> Generator[driver.BlockResult, None, None]:
    """`driver.run` with the fields of `Execution` as keywords."""
    return driver.run(*model_and_method, Execution(**options), start)
