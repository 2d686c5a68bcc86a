"""The conditions that published checkpoints come in, as the sweep has them."""

from __future__ import annotations

import pytest

from benchmarks.models import rows
from tests.e2e import row_case


@pytest.mark.slow
@pytest.mark.parametrize("row", row_case.loaded(rows.CONDITIONS))
def test_a_row_is_quantized_and_loads_to_the_same(row, tmp_path):
    row_case.check(row, tmp_path)
