"""Compare methods x bits x calibration sizes on one model.

Every cell is a whole run, block by block, that is judged as it goes: what `quantize` would make, without a checkpoint
ever being written.

Finished cells stand in cells.jsonl, one line each, under the fingerprint of everything that they depend on. A second
run skips them. An interrupted comparison resumes, and one with more methods adds its cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Unpack

from sarqc.checkpoint.folders import check_overlap, check_place
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.comparison import experiment as benches
from sarqc.comparison import page as pages
from sarqc.comparison import table as tables
from sarqc.comparison.experiment import Cell, Experiment, Other
from sarqc.comparison.store import CELLS, Cells
from sarqc.config import AUTO, MethodConfig, QuantConfig
from sarqc.config_compare import COMPARE, ComparisonConfig, MeasureConfig
from sarqc.errors import ArgumentError, CheckpointError, Interrupted
from sarqc.keywords import CompareKeywords
from sarqc.model.hub import locate_source
from sarqc.model.layers import Targets, auto_group_size, check_group_size, targets
from sarqc.options import documented, split_by_config, with_alias
from sarqc.report.summary import figure
from sarqc.system import versions


class Progress(Protocol):
    """Receives the progress of a comparison; called from the thread that runs it."""

    def note(self, text: str) -> None:
        """Something worth one line."""

    def begin(self, label: str, total: int) -> None:
        """So many steps follow: the cells that are not there yet."""

    def detail(self, text: str) -> None:
        """What is going on inside a step."""

    def advance(self, text: str) -> None:
        """A step is done."""

    def stop_requested(self) -> bool:
        """Asked after each step: whether the comparison should stop there."""


class NoProgress:
    """Ignores the progress."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, label: str, total: int) -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""

    def advance(self, text: str) -> None:
        """Nothing."""

    def stop_requested(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        out: Folder with compare.json, compare.csv, compare.svg, compare.html and cells.jsonl.
        table: What compare.json holds.
    """

    out: Path
    table: dict[str, Any]


@with_alias(watcher="progress")
@documented(*COMPARE)
def compare(
    model: str | Path,
    out: str | Path,
    *,
    what: ComparisonConfig | None = None,
    measure: MeasureConfig | None = None,
    progress: Progress | None = None,
    **options: Unpack[CompareKeywords],
) -> Comparison:
    """Measure every method at every bits, group size, calibration size and seed; write the table to the folder `out`.

    For one seed a smaller number of sequences is part of a larger one. Every cell gets perplexity, agreement of the
    likeliest next token and mean KL divergence, the last two against the unquantized model on the same sequences.
    Memory holds two blocks, the Gram matrices of a site and the hidden states of the texts.

    Args:
        model: Local folder, hub id, or "smollm2".
        out: Folder for the table and the finished cells.
        what: What to compare.
        measure: What to measure on.
        progress: Receives the progress.
        {options}

    Returns:
        The folder and the table.

    Raises:
        SarqcError: Anything wrong with the input.
        Interrupted: `progress` asked the comparison to stop; finished cells are saved.
    """
    given = split_by_config(COMPARE, options)
    what = ComparisonConfig.made(what, given[ComparisonConfig])
    measure = MeasureConfig.made(measure, given[MeasureConfig])
    also = [Other.parsed(one) if isinstance(one, str) else one for one in measure.also]
    progress, out = progress or NoProgress(), Path(out).expanduser()
    folder = locate_source(model, trust_remote_code=what.trust_remote_code)
    check_place(out)
    check_overlap(out, folder)
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS).exists():
        raise CheckpointError(f"output folder {out} holds something else than a comparison: choose another one")
    for name, values in (
        ("methods", what.methods), ("bits", what.bits), ("seeds", what.seeds), ("num_samples", what.num_samples),
        ("texts", measure.texts),
    ):  # fmt: skip
        if not values:
            raise ArgumentError(f"{name} is empty: give at least one")
    methods = _methods(what.methods)
    with open_checkpoint(folder) as checkpoint:
        experiment = benches.make(checkpoint, what, measure.column)
        selected = targets(experiment.solver, QuantConfig(ignore=what.ignore))
        cells = _cells(what, methods, list(_quants(selected, what)))
        for line in benches.shorter(experiment, what, measure):
            progress.note(line)
        progress.note("measuring the unquantized model")
        benches.add_texts(experiment, measure, what.trust_remote_code)
        protocol = _protocol(experiment, str(model))
        done = Cells(out, partial(benches.identity, experiment))
        _work(experiment, [*also, *cells], done, protocol, progress)
    table = tables.table(protocol, [done[cell] for cell in (*cells, *also)])
    pages.write(out, table)
    return Comparison(out, table)


# -- the cells ------------------------------------------------------------------------------------------------------


def parse_method(method: str) -> MethodConfig:
    """The method of "NAME" or "NAME@LAMBDA"."""
    name, at, fixed = method.partition("@")
    try:
        given: dict[str, Any] = {"reg_lambda": float(fixed)} if at else {}
    except ValueError:
        raise ArgumentError(f"method = {method!r} is not accepted: after @ give a number, reg_lambda") from None
    return MethodConfig(name, **given)


def _methods(labels: Sequence[str]) -> dict[str, MethodConfig]:
    """The methods by label. A cell is kept under its method, so two labels of one would overwrite each other."""
    methods: dict[str, MethodConfig] = {}
    for label in dict.fromkeys(labels):
        method = parse_method(label)
        twin = next((other for other, known in methods.items() if known == method), None)
        if twin is not None:
            raise ArgumentError(f"methods = {twin!r} and {label!r} are the same method: give one of them")
        methods[label] = method
    return methods


def _quants(selected: Targets, what: ComparisonConfig) -> Iterator[QuantConfig]:
    for group_size in what.group_sizes:
        size = auto_group_size(selected) if group_size == AUTO else group_size
        for width in what.bits:
            quant = QuantConfig(bits=width, group_size=size, sym=what.sym, ignore=what.ignore)
            check_group_size(selected, quant)
            yield quant


def _cells(what: ComparisonConfig, methods: Mapping[str, MethodConfig], quants: Sequence[QuantConfig]) -> list[Cell]:
    """All cells, those of one seed and size together; a method that is not calibrated has one cell for all of them."""
    cells: dict[Cell, None] = {}
    for seed in what.seeds:
        for size in sorted(set(what.num_samples)):
            for quant in quants:
                for label, method in methods.items():
                    calibrated = (size, seed) if method.calibrated else (None, None)
                    cells[Cell(label, quant, method, *calibrated)] = None
    return list(cells)


# -- the work -------------------------------------------------------------------------------------------------------


def _work(
    experiment: Experiment, cells: Sequence[Cell | Other], done: Cells, protocol: dict[str, Any], progress: Progress
) -> None:
    """Measure the cells that are not there yet."""
    for other in (cell for cell in cells if isinstance(cell, Other) and cell not in done):
        done.add(other, benches.measure_other(experiment, other, progress.detail))
    missing = [cell for cell in cells if isinstance(cell, Cell) and cell not in done]
    there = len(cells) - len(missing)
    progress.note(f"{len(cells)} cells" + (f", {there} of them there already" if there else ""))
    progress.begin("cells", len(missing))
    for count, cell in enumerate(missing, start=1):
        record = benches.measure(experiment, cell, progress.detail)
        done.add(cell, record)
        pages.write(done.folder, tables.table(protocol, [done[c] for c in cells if c in done]))
        progress.advance(_cell_line(record))
        if count < len(missing) and progress.stop_requested():
            raise Interrupted(
                f"stopped after {there + count} of {len(cells)} cells, which are saved in {done.folder}: "
                "rerun the command to resume"
            )


def _protocol(experiment: Experiment, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "mode": "whole runs: every layer is quantized on what the quantized ones before it put out",
        "calibration": {"text": experiment.calibration.text, "seqlen": experiment.calibration.tokens.shape[1]},
        "texts": [text.windows.record() | {"perplexity": text.perplexity} for text in experiment.texts],
        "dtype": str(experiment.dtype).removeprefix("torch."),
        "device": str(experiment.device),
        "versions": versions(),
    }


def _cell_line(record: dict[str, Any]) -> str:
    text = "" if record["windows"] is None else f", {record['windows']} sequences, seed {record['seed']}"
    numbers = ", ".join(figure(entry["perplexity"]) for entry in record["quality"].values()) or record["failed"]
    return f"{record['method']} {record['bits']} bits g{record['group_size']}{text}: perplexity {numbers}"
