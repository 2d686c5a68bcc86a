"""Peak memory is that of a block or two, not of the model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import tiny

WIDE = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8)
BLOCK_MIB = (4 * 512 * 512 + 3 * 512 * 2048) * 4 / 2**20
MEASURE = """
import sys
import sarqc
report = sarqc.quantize(sys.argv[1], sys.argv[2], num_samples=2, seqlen=32, group_size=64, reg_lambda=0.3).report
print(report["peak_memory_mib"]["host"])
"""


def peak_mib(blocks: int, folder) -> float:
    source = tiny.save("llama", folder / f"{blocks}-blocks", num_hidden_layers=blocks, **WIDE)
    # By default glibc keeps freed tensors of a few MiB for itself: that is its memory, not ours.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(source), str(folder / f"{blocks}-out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
    return float(done.stdout)


@pytest.mark.slow
def test_peak_does_not_grow_with_the_number_of_blocks(tmp_path):
    few, many = peak_mib(2, tmp_path), peak_mib(8, tmp_path)
    assert many - few < 2 * BLOCK_MIB, f"{few:.0f} MiB with 2 blocks, {many:.0f} MiB with 8 of {BLOCK_MIB:.0f} MiB each"
