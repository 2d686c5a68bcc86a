import torch

from sarqc.method.weight import QuantizedWeight


def test_dequantize_is_code_minus_zero_times_scale():
    weight = QuantizedWeight(
        codes=torch.tensor([[[0, 3, 7, 4]]], dtype=torch.uint8),
        scales=torch.tensor([[[0.5, 2.0]]]),
        zeros=torch.tensor([[[1, 4]]], dtype=torch.uint8),
        bits=3,
    )
    assert torch.equal(weight.dequantize(), torch.tensor([[[-0.5, 1.0, 6.0, 0.0]]]))
    assert weight.group_size == 2 and not weight.sym
    assert weight.dequantize(torch.float16).dtype == torch.float16


def test_split_takes_rows_apart():
    codes = torch.arange(24, dtype=torch.uint8).view(1, 6, 4)
    whole = QuantizedWeight(codes, torch.ones(1, 6, 1), torch.full((1, 6, 1), 16, dtype=torch.uint8), bits=5)
    first, second = whole.split([2, 4])
    assert torch.equal(torch.cat([first.codes, second.codes], 1), codes)
    assert whole.sym and second.codes.shape == (1, 4, 4)
