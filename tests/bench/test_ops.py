"""What the ops of the bench claim: least work by hand, rivals that compute the same, errors that see a wrong result."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import OPS, moe, w4a16
from benchmarks.ops.base import H200
from benchmarks.rivals import gptq_eager
from sarqc_kernels import fit_grid, quantize_columns
from sarqc_kernels.testing import random_gram, upper_factor

CPU = torch.device("cpu")


def point_of(op: str, name: str):
    return next(point for point in OPS[op].points(False) if point.name == name)


def test_least_work_by_hand():
    gram = point_of("gram", "262144 x 4096")
    assert gram.flops == pytest.approx(262144 * 4096**2, rel=1e-3)  # half of 2 T K^2
    assert H200.seconds(gram) == pytest.approx(5.74e-3, rel=0.03)  # kernels.md has it with tiles of 128
    matmul = point_of("w4a16", "1 x 8192 x 8192")
    assert matmul.traffic == pytest.approx(34.6e6, rel=0.01) and H200.bound(matmul) == "memory"
    assert H200.bound(point_of("w4a16", "4096 x 8192 x 8192")) == "compute"
    columns = point_of("columns", "4096 x 4096")
    assert columns.flops == pytest.approx(4096**3 / 3 + 4096**3)
    mixtral = point_of("moe", "Mixtral-8x7B 1")
    assert H200.seconds(mixtral) == pytest.approx(42.3e-6, rel=0.03)


def test_routing_is_by_token_and_repeats():
    counts = moe.routed(64, 16, 4)
    assert int(counts.sum()) == 256 and int(counts.max()) <= 64
    assert torch.equal(counts, moe.routed(64, 16, 4))


@pytest.mark.parametrize("name", OPS)
def test_errors_notice_a_wrong_result(name):
    """What is right passes, and the same with a part of it spoiled does not."""
    op = OPS[name]
    point = op.points(True)[-1]
    inputs = op.inputs(point, CPU, torch.Generator().manual_seed(1))
    right = next(c for c in op.contenders if c.name == "sarqc reference").bind(inputs)()
    assert op.error(inputs, right) <= op.most_error
    spoiled = (
        tuple(-part for part in right) if isinstance(right, tuple) else 15 - right if name == "columns" else -right
    )
    assert not op.error(inputs, spoiled) <= op.most_error


def test_the_layer_of_experts_is_judged_by_its_own_result():
    inputs = moe.make(moe.points(True)[-1], CPU, torch.Generator().manual_seed(1))
    right = next(c for c in moe.OP.contenders if c.name == "sarqc experts cpu").bind(inputs)()
    assert moe.error(inputs, right) <= moe.OP.most_error
    for token in (0, -1):
        spoiled = right.clone()
        spoiled[token] *= 1.1
        assert moe.error(inputs, spoiled) > moe.OP.most_error


@pytest.mark.parametrize("bits", w4a16.OTHER_WIDTHS)
def test_other_widths_read_their_own_bytes(bits):
    four = point_of("w4a16", "16 x 28672 x 4096")
    other = point_of("w4a16", f"16 x 28672 x 4096 W{bits}")
    assert four.traffic - other.traffic == pytest.approx((4 - bits) / 8 * 28672 * 4096)


def test_the_eager_loop_gives_the_codes_of_the_solver(generator):
    """GPTQ's textbook form and ours are the same recurrence on the reversed order of columns' factor."""
    hessian = random_gram(generator, 1, 64).float()
    weight = torch.randn(1, 24, 64, generator=generator)
    rule = {"bits": 4, "group_size": 16, "sym": True, "search": False, "scale_dtype": torch.float32}
    scales, zeros = fit_grid(weight, None, **rule)
    ours, _, _ = quantize_columns(weight, upper_factor(hessian), None, scales, zeros, **rule)
    theirs = gptq_eager.quantize(weight[0], hessian[0], scales[0], zeros[0], 4)
    assert float((ours[0] == theirs).float().mean()) >= 0.99


def test_rivals_that_are_not_here_say_why():
    for op in OPS.values():
        point = op.points(True)[0]
        for contender in op.contenders:
            reason = contender.unsupported(point, CPU)
            assert reason is None or len(reason) > 10
    absent = {c.name: c.unsupported(OPS["w4a16"].points(True)[0], CPU) for c in OPS["w4a16"].contenders}
    assert absent["humming"] == "humming is not installed"
    assert absent["gemlite (h100 table)"] == "gemlite is not installed"
