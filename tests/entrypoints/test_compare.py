"""A comparison: the same numbers as the long way round, from one calibration, and nothing measured twice."""

from __future__ import annotations

import csv
import json
from io import StringIO

import pytest
import torch
from rich.console import Console

import sarqc
from benchmarks.quality.proof import as_markdown
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.cli.comparison import comparison_tables
from sarqc.comparison import experiment as module
from sarqc.comparison import table as tables
from sarqc.comparison.experiment import Other
from sarqc.comparison.store import Cells
from sarqc.config_compare import ComparisonConfig, MeasureConfig
from sarqc.entrypoints.compare import NoProgress, compare
from sarqc.errors import ArgumentError, CheckpointError, Interrupted, ModelError, TextError
from sarqc.model.calibration_data import windows
from sarqc.model.dataset import Windows
from tests.support import families, tiny

CPU = torch.device("cpu")
HOW = dict(seqlen=32, eval_seqlen=48, eval_windows=3, num_samples=(4,))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """One block, so that the prefix of every block is the embedding in a comparison and in a run alike."""
    return tiny.save("mixtral", tmp_path_factory.mktemp("models") / "shallow", num_hidden_layers=1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "deep")


def cell(result, method, **what):
    (one,) = [c for c in result.table["cells"] if c["method"] == method and all(c[key] == what[key] for key in what)]
    return one


def test_cells_are_what_a_run_and_an_evaluation_give(shallow, tmp_path):
    """Judged another way: the run's checkpoint, loaded whole; and the same checkpoint taken into the table."""
    methods = ("rtn", "gptq")
    comparison = compare(shallow, tmp_path / "table", methods=methods, bits=(3,), seeds=(5,), **HOW)
    for method in methods:
        run = sarqc.quantize(shallow, tmp_path / method, method=method, bits=3, num_samples=4, seqlen=32, seed=5)
        measured = sarqc.evaluate(run.out, seqlen=48, max_windows=3, packed=False)
        one = cell(comparison, method)
        # Micro-batches and folds add up in another order, so that a code at a tie may fall the other way.
        assert one["quality"]["builtin"]["perplexity"] == pytest.approx(measured.perplexity, rel=2e-4), method
        assert one["error"] == pytest.approx(run.report["error"], rel=0.02), method
        assert one["rtn_error"] == pytest.approx(run.report["rtn_error"], rel=0.02), method
    text = comparison.table["protocol"]["texts"][0]
    assert text["perplexity"] == pytest.approx(sarqc.evaluate(shallow, seqlen=48, max_windows=3).perplexity, rel=1e-4)
    also = [Other("the run", 3, 64, 4, 5, tmp_path / "gptq")]
    grown = compare(shallow, tmp_path / "table", methods=methods, bits=(3,), seeds=(5,), also=also, **HOW)
    quality = cell(grown, "the run")["quality"]["builtin"]
    assert quality["perplexity"] == pytest.approx(
        sarqc.evaluate(tmp_path / "gptq", seqlen=48, max_windows=3, packed=False).perplexity
    )
    assert quality["kl"] == pytest.approx(cell(comparison, "gptq")["quality"]["builtin"]["kl"], rel=0.02)
    assert len(grown.table["cells"]) == len(methods) + 1


@pytest.mark.parametrize("row", ["gpt2", "gpt_oss"])
def test_matrices_that_a_checkpoint_stores_in_other_forms_are_compared(row, tmp_path):
    """Of inputs x outputs, and all experts in one tensor."""
    source = families.save(row, tmp_path / "in")
    comparison = compare(source, tmp_path / "table", methods=("rtn",), bits=(4,), group_sizes=(32,), **HOW)
    measured = sarqc.evaluate(families.rounded(source, tmp_path / "out"), seqlen=48, max_windows=3, packed=False)
    perplexity = cell(comparison, "rtn")["quality"]["builtin"]["perplexity"]
    assert perplexity == pytest.approx(measured.perplexity, rel=2e-4)


def test_agreement_and_divergence_are_those_of_the_two_models(deep, tmp_path):
    comparison = compare(deep, tmp_path / "table", methods=("rtn",), bits=(2, 8), **HOW)
    out = sarqc.quantize(deep, tmp_path / "out", method="rtn", bits=2).out
    texts = windows("builtin", tiny.tokenizer, 48, part="evaluation").last(3)
    with torch.no_grad():
        before, after = (
            torch.log_softmax(sarqc.load(folder, packed=False)[0](texts.tokens).logits[:, :-1], -1)
            for folder in (deep, out)
        )
    quality = cell(comparison, "rtn", bits=2)["quality"]["builtin"]
    assert quality["kl"] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    # Two tokens that tie within rounding may come out either way.
    expected = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    assert quality["agreement"] == pytest.approx(expected, abs=2 / before[..., 0].numel())
    assert cell(comparison, "rtn", bits=8)["quality"]["builtin"]["kl"] < 0.01 * quality["kl"]


class Stop(Exception):
    pass


class StopAfter(NoProgress):
    def __init__(self, steps):
        self.left = steps
        self.steps = []

    def advance(self, text):
        self.steps.append(text)
        self.left -= 1
        if not self.left:
            raise Stop


def without_times(result):
    return [{k: v for k, v in c.items() if k != "seconds"} for c in result.table["cells"]]


def test_an_interruption_loses_the_cell_in_progress_and_nothing_else(deep, tmp_path, monkeypatch):
    how = HOW | dict(methods=("rtn", "gptq", "sarqc-gptq@0.3"), bits=(3,), num_samples=(2, 4), seeds=(0, 1))
    straight = compare(deep, tmp_path / "straight", **how)
    out = tmp_path / "broken"
    with pytest.raises(Stop):
        compare(deep, out, progress=StopAfter(5), **how)
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 9
    assert len(json.loads((out / "compare.json").read_text())["cells"]) == len(lines)
    (out / "cells.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:40])  # cut off in the middle of a line
    rest = StopAfter(100)
    again = compare(deep, out, progress=rest, **how)
    assert without_times(again) == without_times(straight)
    assert sum("perplexity" in step for step in rest.steps) == 9 - len(lines)
    monkeypatch.setattr(module.driver, "run", None)
    assert without_times(compare(deep, out, **how)) == without_times(straight)


class AsksToStop(NoProgress):
    def stop_requested(self):
        return True


def test_a_comparison_that_is_asked_to_stop_does_so_after_the_cell_at_work(deep, tmp_path):
    how = HOW | dict(methods=("rtn", "rtn-search"), bits=(3,))
    with pytest.raises(Interrupted, match=r"stopped after 1 of 2 cells.*rerun the command to resume"):
        compare(deep, tmp_path, progress=AsksToStop(), **how)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 1
    assert len(compare(deep, tmp_path, progress=AsksToStop(), **how).table["cells"]) == 2


def test_a_cell_is_identified_once(tmp_path):
    asked = []
    cells = Cells(tmp_path, lambda cell: asked.append(cell) or str(cell))
    assert 3 not in cells
    cells.add(3, {"windows": 4})
    assert 3 in cells and cells[3] == {"windows": 4} and asked == [3]


def test_table_csv_and_plot_hold_every_cell(deep, tmp_path):
    text = tmp_path / "b|<i>.txt"
    text.write_text("one thing leads to another and that to a third " * 200)
    how = HOW | dict(bits=(4,), num_samples=(2, 4), seeds=(0, 1), texts=("builtin", str(text)))
    comparison = compare(deep, tmp_path / "out", methods=("rtn", "gptq"), **how)
    assert len(comparison.table["rows"]) == 2 * 2 * 2
    assert [row["method"] for row in comparison.table["rows"] if row["best"]] and comparison.table["rows"][1][
        "seeds"
    ] == 2
    with (tmp_path / "out" / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 + 2 * 5 and lines[0]["method"] == "unquantized"
    svg = (tmp_path / "out" / "compare.svg").read_text()
    assert svg.count("polyline") == 2 * 2 and "<i>" not in svg
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<figure>") == 2 and "<i>" not in page and page.count('class="best"') == 2 * 2
    markdown = as_markdown(comparison.table)
    assert len(markdown.splitlines()) == 2 + 4 and "b\\|<i>.txt" in markdown


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (dict(methods=()), ArgumentError, "methods is empty"),
        (dict(methods=("gptq@much",)), ArgumentError, "gptq@much"),
        (dict(methods=("magic",)), ArgumentError, "magic"),
        (dict(methods=("gptq", "rtn", "gptq@0.01")), ArgumentError, "'gptq' and 'gptq@0.01' are the same method"),
        (dict(bits=(9,)), ArgumentError, r"bits = \(9,\)"),
        (dict(group_sizes=(48,)), ArgumentError, "48"),
        (dict(num_samples=(0, 4)), ArgumentError, "num_samples"),
        (dict(num_samples=(10**6,)), TextError, "1000000"),
        (dict(texts=("nowhere.txt",)), TextError, "nowhere"),
        (dict(eval_windows=0), ArgumentError, "eval_windows = 0"),
        (dict(seqlen=257), ArgumentError, "seqlen = 257 is more than the 256 positions"),
        (dict(eval_seqlen=257), ArgumentError, "eval_seqlen = 257 is more than the 256 positions"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(deep, tmp_path, how, error, message):
    with pytest.raises(error, match=message):
        compare(deep, tmp_path / "out", **HOW | how)
    assert not (tmp_path / "out").exists()


def test_sequences_are_no_longer_than_the_model_reads(deep):
    what, measure = ComparisonConfig(num_samples=(1,)), MeasureConfig(eval_windows=1)
    with open_checkpoint(deep) as checkpoint:
        experiment = module.make(checkpoint, what, None)
        module.add_texts(experiment, measure, False)
    assert experiment.calibration.tokens.shape[1] == experiment.texts[0].windows.tokens.shape[1] == 256
    assert len(list(module.shorter(experiment, what, measure))) == 2
    assert list(module.shorter(experiment, ComparisonConfig(seqlen=64), MeasureConfig(eval_seqlen=64))) == []


def test_one_pattern_is_not_its_letters(deep, tmp_path):
    with pytest.raises(ArgumentError, match="ignore = 'nowhere_proj' finds no Linear"):
        compare(deep, tmp_path / "out", ignore="nowhere_proj", **HOW)


def test_other_refusals(deep, tmp_path):
    with pytest.raises(ModelError):
        compare(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="inside"):
        compare(deep, deep / "out")
    quantized = sarqc.quantize(deep, tmp_path / "q", method="rtn").out
    with pytest.raises(CheckpointError, match="quantized already"):
        compare(quantized, tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cells.jsonl").write_text("[1, 2]\n")
    with pytest.raises(CheckpointError, match="line 1"):
        compare(deep, tmp_path / "bad", methods=("rtn",), **HOW)


def test_other_checkpoints_are_written_in_one_word(tmp_path):
    folder = tmp_path / "b=c"
    with pytest.raises(ArgumentError, match="is no folder of a checkpoint"):
        Other.parsed(f"AWQ:4:64:16:0={folder}")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert Other.parsed(f"AWQ:4:64:16:0={folder}") == Other("AWQ", 4, 64, 16, 0, folder)
    assert Other.parsed(f"RTN:4:64::={folder}") == Other("RTN", 4, 64, None, None, folder)
    for argument in ("AWQ", "AWQ:four:64:16:0=x", "AWQ:4:64:16=x", "AWQ:4:64:16:0:9=x"):
        with pytest.raises(ArgumentError, match="METHOD:BITS:GROUP"):
            Other.parsed(argument)


def record(method, seed, perplexity, windows=16):
    quality = {} if perplexity is None else {"t": {"perplexity": perplexity, "agreement": 0.5, "kl": 0.1}}
    return dict(
        method=method, bits=3, group_size=64, windows=windows, seed=seed, quality=quality, error=0.1,
        failed=None if perplexity else "not finite", seconds={"solve": 1.0, "total": 2.0},
    )  # fmt: skip


PROTOCOL = {"texts": [{"text": "t", "perplexity": 9.0}]}


def test_ties_are_judged_seed_by_seed():
    luck = {0: 1.0, 1: 1.3, 2: 0.8}  # what the draw of the windows does to every method alike
    cells = [record("a", seed, 10 * by) for seed, by in luck.items()]
    cells += [record("b", seed, 10.2 * by) for seed, by in luck.items()]
    cells += [record("c", seed, 10 * by * (1.0, 1.1, 0.95)[seed]) for seed, by in luck.items()]
    cells += [record("rtn", None, 13.5, windows=None)]
    rows = {row["method"]: row for row in tables.table(PROTOCOL, cells)["rows"]}
    assert rows["a"]["best"] and rows["a"]["spread"] == pytest.approx(2.667, abs=0.01)
    assert not rows["b"]["tied"]  # always worse by 2 %, though far inside the spread of either
    assert rows["c"]["tied"] and not rows["rtn"]["tied"]
    assert rows["rtn"]["spread"] is None
    alone = tables.table(PROTOCOL, [record("a", 0, 10.0), record("b", 0, 10.0001)])["rows"]
    assert not any(row["tied"] for row in alone)
    fewer = [record("a", seed, 10.0) for seed in range(3)] + [record("b", 0, 10.5)]
    assert not any(row["tied"] for row in tables.table(PROTOCOL, fewer)["rows"])  # one seed in common is not enough


def test_logits_that_are_not_finite_are_a_result():
    rows = tables.table(PROTOCOL, [record("a", 0, 10.0), record("b", 0, None)])["rows"]
    assert rows[1]["perplexity"] is None and not rows[1]["best"]
    assert tables.perplexity(rows[1]) == "not finite"
    assert "<circle" in tables.plot(tables.table(PROTOCOL, [record("a", 0, 10.0), record("b", 0, None)]))


def test_thousands_have_no_decimals():
    cells = [record("a", 0, 5000.4), record("a", 1, 7000.2), record("b", 0, 13.2), record("b", 1, 13.4)]
    assert [tables.with_spread(row) for row in tables.table(PROTOCOL, cells)["rows"]] == [
        "6,000 ± 1,000",
        "13.30 ± 0.10",
    ]


def test_a_narrow_terminal_cuts_no_number():
    """A long name, of another tool's checkpoint, goes on in the next line."""
    long = [record("the gptq of another tool", seed, 130.0 + seed) for seed in (0, 1)]
    result = tables.table(PROTOCOL | {"model": "m"}, [*long, record("rtn", 0, 1234567.0)])
    for width in (80, 70):
        out = StringIO()
        for shown in comparison_tables(result):
            Console(file=out, width=width).print(shown)
        lines = out.getvalue().splitlines()
        assert any("130.50 ± 0.50" in line for line in lines) and any("1,234,567" in line for line in lines)
        assert "…" not in out.getvalue() and all(len(line.rstrip()) <= width for line in lines)


def test_smaller_sizes_are_the_beginning_of_larger_ones(deep):
    text = Windows.of_tokens(torch.arange(40)[:, None].expand(-1, 4).contiguous())
    nested = text.nested([3, 8, 20], seed=7).tokens
    for size in (3, 8, 20):
        assert torch.equal(nested[:size].sort(0).values, text.draw(size, 7).tokens.sort(0).values)
    assert torch.equal(nested[:3], text.draw(3, 7).tokens)


def test_a_folder_of_something_else_is_not_written_into(deep, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds something else than a comparison: choose another one"):
        compare(deep, tmp_path / "checkpoint", methods=("rtn",), **HOW)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["config.json"]
