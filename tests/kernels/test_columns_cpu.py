"""csrc/columns_cpu.cpp: the same bits as the reference, on this machine; and what happens where they would not be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sarqc_kernels import BackendError, cpu_build, fit_grid, quantize_columns
from sarqc_kernels.backend import explain
from sarqc_kernels.columns import cpu_impl, grid, implementations, reference
from sarqc_kernels.device import fastest_first
from sarqc_kernels.testing import poisoned_empty, random_gram, upper_factor
from tests.kernels.columns_cases import Case

CASES = [
    Case(1, 70, 192, 64, search=True),
    Case(1, 1, 48, 16, 3, sym=False, search=True),
    Case(3, 65, 320, 32, 3, sym=False, search=True, order="group", dtype=torch.bfloat16),
    Case(2, 9, 600, 300, 2, search=True, order="group", dtype=torch.float32),
    Case(1, 130, 270, 135, 2, sym=False),
    Case(2, 40, 300, 50, 3, sym=False, given=True, order="any"),
    Case(1, 20, 17, 1, 5, sym=False),
    *(Case(1, 64, 256, 128, bits, sym=bits % 2 == 0, search=True) for bits in range(2, 9)),
]


@pytest.fixture
def fresh():
    """What is remembered of a library is forgotten before and after."""
    for known in (cpu_impl.unsupported_reason, cpu_build.library):
        known.cache_clear()
    yield
    for known in (cpu_impl.unsupported_reason, cpu_build.library):
        known.cache_clear()


def needed() -> None:
    if reason := cpu_impl.unsupported_reason():
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case: Case, generator: torch.Generator) -> None:
    needed()
    weight = torch.randn(case.experts, case.rows, case.columns, generator=generator) * 0.02
    factor = upper_factor(random_gram(generator, case.experts, case.columns)).float()
    factor[-1:, 3, 3] = factor[-1:, 3, 3] if case.experts == 1 else float("nan")
    importance = factor.diagonal(dim1=1, dim2=2).square().nan_to_num(1.0)
    grids = [fit_grid(weight, importance, **case.rule, backend=name) for name in ("reference", "cpu")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grids))
    given = grids[0] if case.given else (None, None)
    order = case.processing_order(generator)
    want = quantize_columns(weight, factor, order, *given, **case.rule, backend="reference")
    with poisoned_empty():
        got = quantize_columns(weight, factor, order, *given, **case.rule, backend="cpu")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))


@pytest.mark.parametrize("members", [*range(1, 40), 64, 135, 256, 257, 300, 4200])
def test_losses_are_added_in_the_order_of_torch(members: int, generator: torch.Generator) -> None:
    """All sizes around the runs of 16 that sums are made of, with rows that do not fill a vector."""
    needed()
    tile = torch.randn(members, 2, 33, generator=generator)
    counts = torch.rand(members, 2, generator=generator)
    rule = grid.GridRule(3, True, True, torch.float32)
    scales, zeros = cpu_impl.fit_tile(tile, counts, rule)
    want = grid.fit_tile(tile, counts, rule)
    assert torch.equal(scales, want[0]) and torch.equal(zeros, want[1])


def test_it_goes_first_on_a_cpu() -> None:
    needed()
    weight = torch.zeros(1, 4, 16)
    for op in ("quantize_columns", "fit_grid"):
        assert fastest_first(implementations()[op], weight)[0].name == "cpu"


def test_a_sum_in_another_order_is_refused(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit in the last place of one column's sums is enough."""
    needed()
    cpu_impl.unsupported_reason.cache_clear()
    pulled = reference._pull

    def other(work, panel, first):
        pull = pulled(work, panel, first)
        pull[1] = torch.nextafter(pull[1], torch.tensor(9.0))
        return pull

    monkeypatch.setattr(reference, "_pull", other)
    assert "another order" in str(cpu_impl.unsupported_reason())
    problem = grid.Problem(torch.zeros(1, 4, 16), torch.eye(16)[None], None, None, None, 16,
                           grid.GridRule(4, True, True, torch.float16))  # fmt: skip
    assert "another order" in str(
        dict(explain("quantize_columns", implementations()["quantize_columns"], [problem]))["cpu"]
    )
    quantize_columns(*problem[:5], bits=4, group_size=16, sym=True, search=True, scale_dtype=torch.float16)
    with pytest.raises(BackendError, match="another order"):
        quantize_columns(*problem[:5], bits=4, group_size=16, sym=True, search=True, scale_dtype=torch.float16,
                         backend="cpu")  # fmt: skip


def test_the_first_call_can_come_while_a_model_is_built(fresh) -> None:
    """Another default dtype and device are set then."""
    needed()
    cpu_impl.unsupported_reason.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert cpu_impl.unsupported_reason() is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_compiler_is_a_reason(fresh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SARQC_CXX", raising=False)
    assert "no C++ compiler" in str(cpu_impl.unsupported_reason())


@pytest.mark.parametrize(("script", "words"), [("exit 3", "failed for columns_cpu.cpp"), (None, "SARQC_CXX = ")])
def test_a_compiler_that_fails_is_a_reason(
    script: str | None, words: str, fresh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "cxx"
    if script is not None:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("SARQC_CXX", str(tool))
    monkeypatch.setenv("SARQC_CACHE", str(tmp_path / "cache"))
    assert words in str(cpu_impl.unsupported_reason())


def test_is_built_once(fresh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name holds the source, the flags and the compiler; a second process finds it."""
    try:
        cpu_build.compiler()
    except BackendError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("SARQC_CACHE", str(tmp_path / "cache"))
    made = cpu_build.compile_library("columns_cpu")
    written = made.stat().st_mtime_ns
    assert cpu_build.compile_library("columns_cpu") == made and made.stat().st_mtime_ns == written
    monkeypatch.setattr(cpu_build, "_VECTORS", {})
    monkeypatch.setattr(cpu_build, "_FLAGS", (*cpu_build._FLAGS, "-DOTHER"))
    assert cpu_build.compile_library("columns_cpu") != made


def test_grids_do_not_depend_on_the_rows_beside(generator: torch.Generator) -> None:
    """Losses, bit for bit, in the reference: torch adds the columns that do not fill a vector in another order."""
    tile, counts = torch.randn(64, 1, 200, generator=generator), torch.rand(64, 1, generator=generator)
    seen: list[torch.Tensor] = []
    loss = grid._loss

    def spying(part, *rest):
        seen.append(loss(part, *rest))
        return seen[-1].clone()

    rule = grid.GridRule(3, True, True, torch.float32)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "_loss", spying)
        grid.fit_tile(tile, counts, rule)
        whole = [each.clone() for each in seen]
        for count in (1, 3, 20, 33, 65, 130, 199):
            seen.clear()
            grid.fit_tile(tile[..., 200 - count :].contiguous(), counts, rule)
            assert all(torch.equal(ours[..., :count], all_[..., 200 - count : 200]) for ours, all_ in zip(seen, whole))
