"""Sets of tensors that make no Linear: a part is missing, one is too many, or they disagree."""

import pytest
import torch

from sarqc.checkpoint.formats import FORMATS
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import CheckpointError
from tests.support.checkpoints import verify, write_weights

FORMAT = FORMATS["compressed-tensors"]


def rewrite(folder, change):
    """Writes the folder's tensors again after `change` has had its way with the dict of them."""
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.raw_load(name) for name in checkpoint.raw_names()}
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    write_weights(folder, tensors)


P = "model.layers.0.mlp.experts.0.up_proj"


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_part_that_is_missing(quantized_folder, part):
    folder, _ = quantized_folder
    rewrite(folder, lambda tensors: tensors.pop(f"{P}.{part}"))
    with pytest.raises(CheckpointError, match=rf"'{P}' is stored as .* where its config says .*{part}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("part", ["weight", "weight_g_idx"])
def test_a_part_too_many(quantized_folder, part):
    folder, _ = quantized_folder
    rewrite(folder, lambda tensors: tensors.update({f"{P}.{part}": torch.zeros(7, 72)}))
    with pytest.raises(CheckpointError, match=rf"'{P}' is stored as .*{part}.*, where its config says"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_shape", torch.tensor([72, 7]), "no groups of 24"),
        ("weight_shape", torch.tensor([8, 72]), r"needs \[8, 7\]"),
        ("weight_shape", torch.tensor([-7, 72]), "no groups"),
        ("weight_shape", torch.tensor([7, 1 << 60]), "no groups|needs"),
        ("weight_shape", torch.tensor([7, 72, 1]), r"int64 \[3\], where int64 \[2\]"),
        ("weight_shape", torch.tensor([7.0, 72.0]), r"float32 \[2\], where int64"),
        ("weight_packed", torch.zeros(7, 7, dtype=torch.int64), "int64"),
        ("weight_packed", torch.zeros(2, 7, 7, dtype=torch.int32), r"int32 \[2, 7, 7\]"),
        ("weight_scale", torch.ones(7, 3, dtype=torch.float64), "float64"),
        ("weight_scale", torch.ones(7, dtype=torch.bfloat16), r"bfloat16 \[7\]"),
        ("weight_zero_point", torch.zeros(7, 3, dtype=torch.int8), r"int8 \[7, 3\]"),
        ("weight_zero_point", torch.zeros(1, 3, dtype=torch.int8), "where int32"),
    ],
)
def test_parts_that_disagree(quantized_folder, part, value, message):
    folder, _ = quantized_folder
    rewrite(folder, lambda tensors: tensors.update({f"{P}.{part}": value}))
    for ask in (verify, lambda folder: open_checkpoint(folder).quantized(P)):
        with pytest.raises(CheckpointError, match=message) as caught:
            ask(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
