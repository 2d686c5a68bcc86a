"""Committed tables: what `choose` does with an entry, what an entry may say, and that all there are say only that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.ops import OPS
from sarqc_kernels import BackendError, tuned
from sarqc_kernels.aot import ARCHS
from sarqc_kernels.columns import config as columns
from sarqc_kernels.device import Device
from sarqc_kernels.gram import config as gram
from sarqc_kernels.w4a16 import config as w4a16

H200 = Device(90, 132)
ROOMS = {"gram": gram, "columns": columns, "w4a16": w4a16}
CALLS = {
    "gram": (1, 8192, 4096, torch.bfloat16, H200, True),
    "columns": (1, 4096, H200),
    "w4a16": (16, 4096, 4096, 128, 0, H200),
}


def with_entry(monkeypatch: pytest.MonkeyPatch, op: str, entry: Mapping[str, Any]) -> str:
    """A table of one entry for the call in `CALLS`; returns its key."""
    numbers = [each for each in CALLS[op] if not isinstance(each, Device)]
    key = ROOMS[op].key(*numbers)
    monkeypatch.setattr(ROOMS[op], "choices", lambda name, arch: {key: entry} if (name, arch) == (op, 90) else {})
    return key


@pytest.mark.parametrize("op", ROOMS)
def test_without_a_table_the_rule_decides(op, monkeypatch):
    monkeypatch.setattr(ROOMS[op], "choices", lambda name, arch: {})
    assert ROOMS[op].choose(*CALLS[op]) == ROOMS[op].rule(*CALLS[op])


def test_an_entry_decides(monkeypatch):
    with_entry(monkeypatch, "gram", {"tile": "128x256x64", "splits": 4})
    plan = gram.choose(*CALLS["gram"])
    assert (plan.tile.n, plan.splits) == (256, 4) and plan != gram.rule(*CALLS["gram"])
    with_entry(monkeypatch, "columns", {"tiles": "many rows"})
    assert (
        columns.choose(*CALLS["columns"])
        == columns.tiles(CALLS["columns"][-1])["many rows"]
        != columns.rule(*CALLS["columns"])
    )
    with_entry(monkeypatch, "w4a16", {"plan": "dot 32 splits 2"})
    product = w4a16.choose(*CALLS["w4a16"])
    assert (product.kernel, product.tokens, product.splits) == ("dot", 32, 2)
    assert product != w4a16.rule(*CALLS["w4a16"])


def test_splits_of_an_entry_do_not_exceed_the_rows_of_a_call(monkeypatch):
    """A table's entry stands for sizes up to twice as small."""
    entry = {"tile": "128x128x64", "splits": 16}
    monkeypatch.setattr(gram, "choices", lambda op, arch: {"bfloat16 even e1 t8192 k1024": entry})
    assert gram.choose(1, 4097, 1024, torch.bfloat16, H200, True).splits == 8  # of at least 512 rows


@pytest.mark.parametrize(
    ("op", "entry"),
    [("gram", {"tile": "1x1x1", "splits": 1}), ("columns", {"tiles": "?"}), ("w4a16", {"plan": "dot 7 splits 1"})],
)
def test_an_entry_that_nobody_verified_is_an_error(op, entry, monkeypatch):
    with_entry(monkeypatch, op, entry)
    with pytest.raises(BackendError, match=f"the {op} table of sm_90 names"):
        ROOMS[op].choose(*CALLS[op])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": []}'])
def test_a_broken_table_is_an_error_that_names_it(text, monkeypatch, tmp_path):
    path = tmp_path / "gram" / "tuned" / "sm_90.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setattr(tuned, "HERE", tmp_path)
    with pytest.raises(BackendError, match=r"sm_90\.json is no table"):
        tuned.choices.__wrapped__("gram", 90)
    assert tuned.choices.__wrapped__("gram", 80) == {}


def test_buckets_are_powers_of_two():
    assert [tuned.bucket(size) for size in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [0, 1, 2, 4, 4, 8, 4096, 8192]


@pytest.mark.parametrize("op", tune.TRIALS)
def test_candidates_are_what_the_ahead_of_time_check_verifies(op):
    verified_tiles = {(arch, tile) for arch, dtype, _, tile in gram.configurations() if dtype == torch.bfloat16}
    for arch in ARCHS:
        card = Device(arch, 132)
        checked = {replace(plan, splits=min(plan.splits, 2)).name for plan, _ in w4a16.configurations(card)}
        for point in OPS[op].points(False):
            for trial in tune.TRIALS[op](point, card):
                assert tune.RULE in trial.values and len(trial.values) > 1
                for entry in trial.values.values():
                    if op == "gram":
                        even = point.sizes["inputs"] % 16 == 0
                        assert (arch, gram.tiles(arch, torch.bfloat16, even)[entry["tile"]]) in verified_tiles
                    elif op == "columns":
                        assert entry["tiles"] in columns.tiles(card)
                    elif entry["plan"] != tune.RULE:
                        tile, splits = entry["plan"].rsplit(" ", 1)
                        assert f"{tile} {min(int(splits), 2)}" in checked
                if op in ("w4a16", "moe") and arch in (90, 100):
                    assert "persistent 128 splits 1" in trial.values


def test_committed_tables_name_only_candidates():
    for path in tuned.HERE.glob("*/tuned/*.json"):
        table, op, arch = json.loads(path.read_text()), path.parts[-3], int(path.stem.removeprefix("sm_"))
        assert table["choices"] and arch in ARCHS and op in ROOMS
        assert set(table["made"]) == {"gpu", "driver", "versions", "commit", "when"}
        for key, entry in table["choices"].items():
            if op == "gram":
                dtype, access = key.split()[:2]
                known = gram.tiles(arch, getattr(torch, dtype), access == "even")
                assert entry["tile"] in known and 1 <= entry["splits"] <= gram.MOST_SPLITS
            elif op == "columns":
                assert entry["tiles"] in columns.tiles(Device(arch, 132))
            else:
                e, m, n, k, g = (int(word[1:]) for word in key.split())
                assert entry["plan"] in w4a16.candidates(m, n, k, k if g == 1 else 128 // g, e, Device(arch, 132))
