"""The sweep's first part: the models that people use most. `make models` gives each stage a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.models import rows
from tests.e2e import row_case


@pytest.mark.slow
@pytest.mark.parametrize("row", row_case.loaded(rows.FIRST))
def test_a_row_is_quantized_and_loads_to_the_same(row, tmp_path):
    row_case.check(row, tmp_path)
