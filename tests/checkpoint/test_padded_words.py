"""Words as compressed-tensors wrote them before 0.18, with bits that hold nothing, are told from dense ones."""

import pytest
import torch

from sarqc.checkpoint.formats import FORMATS, compressed_tensors_config
from sarqc.config import QuantConfig

FORMAT = FORMATS["compressed-tensors"]


def padded(table: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes in words as compressed-tensors 0.17 wrote them: floor(32 / bits) codes to a word, lowest first."""
    lanes = 32 // bits
    words = [[0] * -(-table.shape[1] // lanes) for _ in table]
    for row, codes in enumerate(table.tolist()):
        for place, code in enumerate(codes):
            words[row][place // lanes] |= code << (bits * (place % lanes))
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)  # no code reaches bit 31, so nothing wraps


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("columns", [256, 192, 40])
def test_padded_words_of_old_versions_are_read(random_weight, columns, bits, sym):
    """Ten 3-bit codes to a word, as 0.17 wrote: mostly the width tells, and where it does not, the version does."""
    weight = random_weight(200, columns, bits, 8, sym)
    packed = FORMAT.pack("p", weight, QuantConfig(bits, 8, sym))
    packed["p.weight_packed"] = padded(weight.codes[0], bits)
    if not sym:
        packed["p.weight_zero_point"] = padded(weight.zeros[0].T, bits).T.contiguous()
    config = FORMAT.config(QuantConfig(bits, 8, sym), []) | {"version": "0.17.1"}
    read = FORMAT.unpack("p", config, packed.__getitem__)
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(read, field), getattr(weight, field)), field


def test_four_bits_never_changed(random_weight):
    four = random_weight(4, 40, 4, 8, True)
    config = FORMAT.config(QuantConfig(4, 8), []) | {"version": "0.9.0"}
    assert torch.equal(
        FORMAT.unpack("p", config, FORMAT.pack("p", four, QuantConfig(4, 8)).__getitem__).codes, four.codes
    )


def test_width_alone_tells_padded_from_dense_in_every_real_layer():
    """From 192 inputs on; below that the version has to decide."""
    for bits in (3, 5, 6, 7):
        for columns in range(192, 20_000):
            assert -(-columns // (32 // bits)) != -(-columns * bits // 32)
    assert compressed_tensors_config.is_padded(compressed_tensors_config.Scheme(3, 8, True, "0.17.2.a20260601"), 40, 4)
    assert not compressed_tensors_config.is_padded(compressed_tensors_config.Scheme(3, 8, True, "0.18.0"), 40, 4)
    assert not compressed_tensors_config.is_padded(compressed_tensors_config.Scheme(3, 8, True, None), 40, 4)
    assert compressed_tensors_config.is_padded(compressed_tensors_config.Scheme(3, 8, True, "0.20.0"), 256, 26)
    assert not compressed_tensors_config.is_padded(compressed_tensors_config.Scheme(3, 8, True, "0.17.1"), 256, 24)
