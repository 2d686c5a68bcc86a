"""A packed Linear's `weight`, for model code that reads it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight
from sarqc.model.packed_linear import DenseView, QuantLinear


@pytest.fixture
def packed(generator):
    codes = torch.randint(0, 16, (1, 8, 64), dtype=torch.uint8, generator=generator)
    scales = torch.rand(1, 8, 2, generator=generator)
    zeros = torch.full((1, 8, 2), 8, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros, 4)
    return QuantLinear(weight, None), weight.dequantize()[0]


def test_its_shape_dtype_and_device_are_those_of_the_dense_weight(packed, monkeypatch):
    module, dense = packed
    monkeypatch.setattr(QuantLinear, "codes", lambda self: pytest.fail("dequantized"))
    for dtype in (torch.float32, torch.bfloat16):
        like = module.activations
        module.activations = like.to(dtype)
        view = module.weight
        assert (view.shape, view.dtype, view.device, view.dim()) == (dense.shape, dtype, dense.device, 2)
        assert isinstance(view, torch.Tensor) and view.numel() == dense.numel() and "4 bits" in repr(view)


def test_operations_see_the_dense_weight(packed, generator):
    module, dense = packed
    x = torch.randn(3, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(x @ module.weight.t(), x @ dense.t())
        assert torch.equal(nn.functional.linear(x, module.weight), nn.functional.linear(x, dense))
        assert torch.equal(module.weight[2:4].float(), dense[2:4])
        assert torch.equal(torch.cat([module.weight, dense]), torch.cat([dense, dense]))
        torch.testing.assert_close(module(x), x @ dense.t())


def test_it_belongs_to_no_state_dict_and_cannot_be_written(packed):
    module, _ = packed
    assert not module.state_dict() and not list(module.parameters())
    assert isinstance(module.weight, DenseView)
    with pytest.raises(ModelError, match="cannot be written"), torch.no_grad():
        module.weight.zero_()
