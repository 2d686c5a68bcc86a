"""Blocks that are one block in several places, of which the checkpoint has one."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

import sarqc
from sarqc.errors import ModelError
from tests.support import families

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("row", ["zamba", "zamba2"])
def test_what_a_refusal_advises_quantizes_the_rest(row, tmp_path):
    source = families.save(row, tmp_path / "model")
    with pytest.raises(ModelError, match=r"its weight is that of \S+ too, and blocks are solved one by one") as refused:
        sarqc.quantize(source, tmp_path / "out", **SMALL)
    pattern = re.search(r"--ignore ('.*')", str(refused.value))
    assert pattern is not None
    out = sarqc.quantize(source, tmp_path / "out", ignore=shlex.split(pattern[1]), **SMALL).out
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    shared = [name for name in before if ".shared_transf" in name and name.endswith("weight")]
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    assert any(name.endswith("weight_packed") for name in after)
    assert families.apart(families.logits(out, ""), families.ours(out)) < 0.05


def test_one_place_alone_is_refused_too(tmp_path):
    """The other would go on with the original weight, and the checkpoint has room for one."""
    source = families.save("zamba2", tmp_path / "model")
    with pytest.raises(ModelError, match="its weight is that of"):
        sarqc.quantize(source, tmp_path / "out", ignore=[r"layers\.3\."], **SMALL)
