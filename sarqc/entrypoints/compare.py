"""Compare methods x bits x calibration sizes on one model.

Every cell is a whole run, block by block, that is judged as it goes: what `quantize` would make, without a checkpoint
ever being written.

Finished cells stand in cells.jsonl, one line each, under the fingerprint of everything that they depend on. A second
run skips them, so that an interrupted comparison goes on where it was, and one with more methods adds to what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from sarqc.checkpoint.folders import refuse_overlap, refuse_place
from sarqc.comparison import experiment as benches
from sarqc.comparison import table as tables
from sarqc.comparison.experiment import Bench, Cell, Other
from sarqc.comparison.store import CELLS, Cells
from sarqc.config import AUTO, QuantSpec, SolveSpec, solve_spec
from sarqc.errors import ArgumentError, CheckpointError
from sarqc.model import dataset
from sarqc.model.hub import locate_source
from sarqc.model.layers import Targets, auto_group_size, check_group_size, targets
from sarqc.report.summary import figure
from sarqc.system import versions


class Watcher(Protocol):
    """Whoever follows a comparison; called from the thread that runs it."""

    def note(self, text: str) -> None:
        """Something worth one line."""

    def begin(self, label: str, total: int) -> None:
        """So many steps follow: the cells that are not there yet."""

    def detail(self, text: str) -> None:
        """What is going on inside a step."""

    def advance(self, text: str) -> None:
        """A step is done."""


class Silent:
    """The watcher that looks away."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, label: str, total: int) -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""

    def advance(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Comparison:
    """out: the folder with compare.json, compare.csv, compare.svg and cells.jsonl. table: what compare.json holds."""

    out: Path
    table: dict[str, Any]


def compare(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = ("rtn", "gptq", "sarqc-gptq"),
    bits: Sequence[int] = (4, 3),
    group_sizes: Sequence[int | Literal["auto"]] = (AUTO,),
    sym: bool = True,
    calib: str | Path | Tensor = dataset.BUILTIN,
    num_samples: Sequence[int] = (16,),
    seqlen: int = 512,
    seeds: Sequence[int] = (0,),
    texts: Sequence[str] = (dataset.BUILTIN,),
    eval_seqlen: int = 512,
    eval_windows: int | None = 16,
    ignore: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    also: Sequence[Other] = (),
    watcher: Watcher | None = None,
) -> Comparison:
    """Measure every method at every bits, group size, calibration size and seed; write the table to the folder `out`.

    methods: keys of `sarqc.METHODS`, or "NAME@0.3" for one at a fixed strength. num_samples: calibration sizes in
    windows of `seqlen` tokens; for one seed a smaller size is part of a larger. texts: what to judge on, as `calib`;
    the last `eval_windows` windows of `eval_seqlen` tokens of each. also: checkpoints of other tools or of whole runs.

    Every cell gets perplexity, agreement of the likeliest next token and mean KL divergence, the last two against the
    unquantized model on the same windows. Memory holds two blocks, the Grams of a site and the hidden states of the
    texts. Raises `SarqcError` for anything wrong with the input.
    """
    watcher, out = watcher or Silent(), Path(out).expanduser()
    folder = locate_source(model, trust_remote_code=trust_remote_code)
    refuse_place(out)
    refuse_overlap(out, folder)
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS).exists():
        raise CheckpointError(f"output folder {out} holds something else than a comparison: choose another one")
    for name, values in (("methods", methods), ("bits", bits), ("seeds", seeds), ("eval", texts)):
        if not values:
            raise ArgumentError(f"{name} is empty: give at least one")
    bench = benches.make(folder, calib, sorted(set(num_samples)), seqlen, seeds, device, dtype, trust_remote_code)
    patterns = QuantSpec(ignore=ignore).ignore
    found = targets(bench.solver, QuantSpec(ignore=patterns))
    quants = list(_quants(found, bits, group_sizes, sym, patterns))
    cells = _cells(methods, quants, sorted(set(num_samples)), seeds)
    watcher.note("judging the unquantized model")
    benches.add_texts(bench, texts, eval_seqlen, eval_windows, trust_remote_code)
    protocol = _protocol(bench, str(model))
    done = Cells(out, partial(benches.identity, bench))
    _work(bench, [*also, *cells], done, protocol, watcher)
    table = tables.table(protocol, [done[cell] for cell in (*cells, *also)])
    tables.write(out, table)
    return Comparison(out, table)


# -- what is asked for ----------------------------------------------------------------------------------------------


def parse_method(method: str, seed: int) -> SolveSpec:
    """The spec of "NAME" or "NAME@STRENGTH"."""
    name, at, strength = method.partition("@")
    try:
        fixed = float(strength) if at else None
    except ValueError:
        raise ArgumentError(f"method = {method!r}: what follows @ must be a number, the strength") from None
    return solve_spec(name, strength=fixed, seed=seed)


def _quants(
    found: Targets,
    bits: Sequence[int],
    group_sizes: Sequence[int | Literal["auto"]],
    sym: bool,
    ignore: Sequence[str],
) -> Iterator[QuantSpec]:
    for group_size in group_sizes:
        size = auto_group_size(found) if group_size == AUTO else group_size
        for width in bits:
            quant = QuantSpec(bits=width, group_size=size, sym=sym, ignore=ignore)
            check_group_size(found, quant)
            yield quant


def _cells(
    methods: Sequence[str], quants: Sequence[QuantSpec], sizes: Sequence[int], seeds: Sequence[int]
) -> list[Cell]:
    """All cells, those of one seed and size together; a method that reads no text has one cell for all of them."""
    cells: dict[Cell, None] = {}
    for seed in seeds:
        for size in sizes:
            for quant in quants:
                for method in methods:
                    solve = parse_method(method, seed)
                    if solve.gram:
                        cells[Cell(method, quant, solve, size, seed)] = None
                    else:
                        cells[Cell(method, quant, parse_method(method, 0), None, None)] = None
    return list(cells)


# -- the work -------------------------------------------------------------------------------------------------------


def _work(bench: Bench, cells: Sequence[Cell | Other], done: Cells, protocol: dict[str, Any], watcher: Watcher) -> None:
    """Measure the cells that are not there yet."""
    for other in (cell for cell in cells if isinstance(cell, Other) and cell not in done):
        done.add(other, benches.measure_other(bench, other, watcher.detail))
    missing = [cell for cell in cells if isinstance(cell, Cell) and cell not in done]
    there = len(cells) - len(missing)
    watcher.note(f"{len(cells)} cells" + (f", {there} of them there already" if there else ""))
    watcher.begin("cells", len(missing))
    for cell in missing:
        record = benches.measure(bench, cell, watcher.detail)
        done.add(cell, record)
        tables.write(done.folder, tables.table(protocol, [done[c] for c in cells if c in done]))
        watcher.advance(_told(record))


def _protocol(bench: Bench, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "mode": "whole runs: every layer is quantized on what the quantized ones before it put out",
        "calibration": {"text": bench.calibration.text, "seqlen": bench.calibration.tokens.shape[1]},
        "texts": [text.windows.record() | {"perplexity": text.perplexity} for text in bench.texts],
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": str(bench.device),
        "versions": versions(),
    }


def _told(record: dict[str, Any]) -> str:
    text = "" if record["windows"] is None else f", {record['windows']} windows, seed {record['seed']}"
    found = ", ".join(figure(entry["perplexity"]) for entry in record["quality"].values()) or record["failed"]
    return f"{record['method']} {record['bits']} bits g{record['group_size']}{text}: perplexity {found}"
