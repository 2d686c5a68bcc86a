"""Compare methods x bits x calibration sizes on one model, at the price of one calibration per seed.

Statistics are collected once per seed from the unquantized model, for all sizes in one pass, and wait on disk; every
cell then solves from them in memory and is judged as it goes, block by block, without a checkpoint ever being written.
That makes this a *one-shot* comparison: each block is solved as if the blocks before it were unquantized, whereas
`quantize` calibrates each block on what the quantized ones before it put out. Methods are comparable with each other
here; whoever wants a method's own best number runs `quantize`.

Finished cells stand in cells.jsonl, one line each, under the fingerprint of everything that they depend on. A second
run skips them, so that an interrupted comparison goes on where it was, and one with more methods adds to what is there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sarqc.checkpoint.folders import refuse_overlap
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.errors import ArgumentError, CheckpointError, NumericError
from sarqc.job import compare_table
from sarqc.job.compare_store import Cells, Grams, folder_fingerprint
from sarqc.job.load import resolve_device, resolve_dtype
from sarqc.job.locate import locate
from sarqc.job.report import versions
from sarqc.method.solve import SolveReport
from sarqc.model import blocks, calibration, stream
from sarqc.model.collect import GLANCE, collect
from sarqc.model.skeleton import Skeleton
from sarqc.model.source import Overlay
from sarqc.model.targets import Targets, auto_group_size, check_group_size, targets
from sarqc.model.tokenizer import load_tokenizer
from sarqc.spec import AUTO, QuantSpec, SolveSpec, solve_spec, to_json

FOLDS = 2
"""Stretches of the calibration text that are kept apart, for methods that judge on one what they fitted on another."""


class Watcher(Protocol):
    """Whoever follows a comparison; called from the thread that runs it."""

    def note(self, text: str) -> None:
        """Something worth one line."""

    def begin(self, label: str, total: int) -> None:
        """So many steps follow: a collection for each seed that needs one, and the cells that are not there yet."""

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
class Cell:
    """One thing to measure. method: as asked for, "NAME" or "NAME@STRENGTH". windows, seed: None without text."""

    method: str
    quant: QuantSpec
    solve: SolveSpec
    windows: int | None
    seed: int | None

    def record(self) -> dict[str, Any]:
        """What the cell is, as JSON values."""
        return {
            "method": self.method,
            "bits": self.quant.bits,
            "group_size": self.quant.group_size,
            "windows": self.windows,
            "seed": self.seed,
        }


@dataclass
class Text:
    """A text to judge on. entering, reference: hidden states before block 0 and after the unquantized last one."""

    windows: calibration.Windows
    entering: Tensor
    reference: Tensor
    perplexity: float


@dataclass
class Bench:
    """What all cells share. solver, judge: two skeletons, because solving and judging hold a block each.

    sizes: calibration sizes, rising. Which windows are in which fold, and the order of sums, depend on all sizes up to
    a cell's own, so they are part of what the cell is.
    """

    fingerprint: str
    folder: Path
    checkpoint: Checkpoint
    solver: Skeleton
    judge: Skeleton
    device: torch.device
    dtype: torch.dtype
    sizes: list[int]
    drawn: dict[int, Tensor]
    calibration: calibration.Windows
    texts: list[Text] = field(default_factory=list)


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
    calib: str | Path | Tensor = calibration.BUILTIN,
    num_samples: Sequence[int] = (16,),
    seqlen: int = 512,
    seeds: Sequence[int] = (0,),
    texts: Sequence[str] = (calibration.BUILTIN,),
    eval_seqlen: int = 512,
    eval_windows: int | None = 16,
    ignore: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> Comparison:
    """Measure every method at every bits, group size, calibration size and seed; write the table to the folder `out`.

    methods: keys of `sarqc.METHODS`, or "NAME@0.3" for one at a fixed strength. num_samples: calibration sizes in
    windows of `seqlen` tokens; for one seed a smaller size is part of a larger. texts: what to judge on, as `calib`;
    the last `eval_windows` windows of `eval_seqlen` tokens of each.

    Every cell gets perplexity, agreement of the likeliest next token and mean KL divergence, the last two against the
    unquantized model on the same windows. Memory holds a block, its statistics and the hidden states of the texts;
    disk the statistics of one seed at a time. Raises `SarqcError` for anything wrong with the input.
    """
    watcher, out = watcher or Silent(), Path(out)
    folder = locate(model, trust_remote_code=trust_remote_code)
    refuse_overlap(out, folder)
    for name, values in (("methods", methods), ("bits", bits), ("seeds", seeds), ("eval", texts)):
        if not values:
            raise ArgumentError(f"{name} is empty: give at least one")
    bench = _bench(folder, calib, sorted(set(num_samples)), seqlen, seeds, device, dtype, trust_remote_code)
    found = targets(bench.solver, QuantSpec(ignore=tuple(ignore)))
    quants = list(_quants(found, bits, group_sizes, sym, tuple(ignore)))
    cells = _cells(methods, quants, sorted(set(num_samples)), seeds)
    watcher.note("judging the unquantized model")
    _add_texts(bench, texts, eval_seqlen, eval_windows, trust_remote_code)
    protocol = _protocol(bench, str(model))
    done = Cells(out, lambda cell: _identity(bench, cell))
    _work(bench, cells, done, found, protocol, watcher)
    table = compare_table.table(protocol, [done[cell] for cell in cells])
    compare_table.write(out, table)
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
    ignore: tuple[str, ...],
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


def _bench(
    folder: Path,
    calib: str | Path | Tensor,
    sizes: Sequence[int],
    seqlen: int,
    seeds: Sequence[int],
    device: str,
    dtype: str,
    trust: bool,
) -> Bench:
    checkpoint = open_checkpoint(folder)
    if checkpoint.format is not None:
        raise CheckpointError(f"{folder} is quantized already ({checkpoint.format.name}): give the original model")
    if isinstance(calib, Tensor):
        text = calibration.Windows.of_tokens(calib)
    else:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust)
        text = calibration.windows(str(calib), tokenizer, part="calibration", seqlen=seqlen)
    if not sizes or sizes[0] < 1:
        raise ArgumentError(f"num_samples = {list(sizes)} is not usable: use numbers from 1 up")
    where = resolve_device(device)
    solver, judge = (Skeleton.from_folder(folder, checkpoint, trust_remote_code=trust) for _ in range(2))
    kept = resolve_dtype(dtype, where, solver.dtype)
    judge.load_outer(checkpoint, where, kept, head=True)
    drawn = {seed: text.nested(sizes, seed).tokens for seed in seeds}
    return Bench(folder_fingerprint(folder), folder, checkpoint, solver, judge, where, kept, list(sizes), drawn, text)


def _add_texts(bench: Bench, texts: Sequence[str], seqlen: int, count: int | None, trust: bool) -> None:
    tokenizer = load_tokenizer(bench.folder, trust_remote_code=trust)
    for name in texts:
        windows = calibration.windows(name, tokenizer, part="evaluation", seqlen=seqlen)
        windows = windows if count is None else windows.last(count)
        entering = stream.enter(bench.judge, windows.tokens)
        reference = stream.leave(bench.judge, bench.checkpoint, windows.tokens)
        perplexity = stream.judge(bench.judge, windows, reference).perplexity
        bench.texts.append(Text(windows, entering, reference, perplexity))


# -- the work -------------------------------------------------------------------------------------------------------


def _work(
    bench: Bench, cells: Sequence[Cell], done: Cells, found: Targets, protocol: dict[str, Any], watcher: Watcher
) -> None:
    """Measure the cells that are not there yet, seed by seed."""
    missing = [cell for cell in cells if cell not in done]
    seeds = dict.fromkeys(cell.seed for cell in missing)
    needed = {seed: _grams(done.folder, missing, seed) for seed in seeds if seed is not None}
    watcher.note(f"{len(cells)} cells, {len(cells) - len(missing)} of them there already")
    watcher.begin("steps", len(missing) + len(needed))
    for seed in seeds:
        grams = needed.get(seed) if seed is not None else None
        if grams is not None and seed is not None:
            _collect(bench, grams, found, bench.drawn[seed], watcher)
            watcher.advance(f"seed {seed}: statistics collected")
        for cell in (cell for cell in missing if cell.seed == seed):
            record = _measure(bench, cell, grams, watcher)
            done.add(cell, record)
            compare_table.write(done.folder, compare_table.table(protocol, [done[c] for c in cells if c in done]))
            watcher.advance(_told(record))
        if grams is not None:
            grams.remove()


def _grams(folder: Path, missing: Sequence[Cell], seed: int) -> Grams:
    sizes = {cell.windows for cell in missing if cell.seed == seed and cell.windows is not None}
    return Grams(folder / "grams" / f"seed-{seed}", sorted(sizes))


def _collect(bench: Bench, grams: Grams, found: Targets, tokens: Tensor, watcher: Watcher) -> None:
    """Statistics of one seed for all sizes that are missing, to disk."""
    sizes = [size for size in bench.sizes if size <= grams.sizes[-1]]
    folds, count = min(FOLDS, sizes[0]), len(bench.judge.blocks)
    grams.begin()
    for index, size, statistics in collect(bench.judge, bench.checkpoint, found, tokens, sizes, folds=folds):
        watcher.detail(f"block {index}: statistics of {size} windows")
        if size in grams.sizes:
            grams.save(index, size, statistics, blocks=count)


def _measure(bench: Bench, cell: Cell, grams: Grams | None, watcher: Watcher) -> dict[str, Any]:
    """Solve and judge one cell, block by block. Logits that are not finite are a result, and stand in the record."""
    began = time.perf_counter()
    hidden = [text.entering.clone() for text in bench.texts]
    reports: list[SolveReport] = []
    solving = 0.0
    for result in _solved(bench, cell, grams, watcher):
        solving += result.seconds.get("solve", 0.0)
        reports += result.reports
        bench.judge.load_block(result.index, Overlay(bench.checkpoint, result.weights), bench.device, bench.dtype)
        for states in hidden:
            stream.through(bench.judge, result.index, states)
        bench.judge.unload_block(result.index)
    found: dict[str, Any] = {}
    failed = None
    for text, states in zip(bench.texts, hidden):
        try:
            tally = stream.judge(bench.judge, text.windows, states, text.reference)
        except NumericError as error:
            failed = str(error)
            continue
        found[text.windows.text] = {
            "perplexity": tally.perplexity,
            "agreement": tally.agreement,
            "kl": tally.kl,
        }
    return cell.record() | {
        "quality": found,
        "failed": failed,
        "error": sum(report.error for report in reports) / len(reports),
        "rounding_error": sum(report.rounding_error for report in reports) / len(reports),
        "strength": [min(r.strength for r in reports), max(r.strength for r in reports)],
        "fallbacks": sum(report.fallback is not None for report in reports),
        "seconds": {"solve": round(solving, 3), "total": round(time.perf_counter() - began, 3)},
    }


def _solved(bench: Bench, cell: Cell, grams: Grams | None, watcher: Watcher) -> Iterator[blocks.BlockResult]:
    tokens, size = None, cell.windows
    recall: blocks.Recall | None = None
    if grams is not None and size is not None:
        tokens = bench.calibration.tokens[:1, :GLANCE]

        def recall(index: int, shares: Sequence[blocks.Share]) -> list[Any]:
            return [grams.load(index, size, s.site.name, s.first, s.stop, bench.device) for s in shares]

    return blocks.run(
        bench.solver,
        bench.checkpoint,
        tokens,
        cell.quant,
        cell.solve,
        device=bench.device,
        dtype=bench.dtype,
        recall=recall,
        on_progress=lambda index, stage: watcher.detail(f"{cell.method} {cell.quant.bits} bits, block {index} {stage}"),
    )


# -- what is written ------------------------------------------------------------------------------------------------


def _identity(bench: Bench, cell: Cell) -> str:
    """Fingerprint of everything a cell's numbers depend on."""
    text = None
    if cell.seed is not None:
        text = calibration.Windows.of_tokens(bench.drawn[cell.seed][: cell.windows]).fingerprint
    known = {
        "protocol": compare_table.PROTOCOL,
        "model": bench.fingerprint,
        "quant": to_json(cell.quant),
        "solve": to_json(cell.solve),
        "calibration": text,
        "sizes": [size for size in bench.sizes if cell.windows is not None and size <= cell.windows],
        "texts": [text.windows.fingerprint for text in bench.texts],
        "dtype": str(bench.dtype),
        "device": bench.device.type,
        "sarqc": versions()["sarqc"],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _protocol(bench: Bench, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "mode": "one-shot: every block is solved on what the unquantized blocks before it put out",
        "calibration": {"text": bench.calibration.text, "seqlen": bench.calibration.tokens.shape[1]},
        "texts": [text.windows.record() | {"perplexity": text.perplexity} for text in bench.texts],
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": str(bench.device),
        "versions": versions(),
    }


def _told(record: dict[str, Any]) -> str:
    text = "" if record["windows"] is None else f", {record['windows']} windows, seed {record['seed']}"
    found = ", ".join(f"{entry['perplexity']:.2f}" for entry in record["quality"].values()) or record["failed"]
    return f"{record['method']} {record['bits']} bits g{record['group_size']}{text}: perplexity {found}"
