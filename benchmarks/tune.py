"""Write the committed tables: python -m benchmarks.tune [gram|columns|w4a16|moe|all] [--minutes 9] [--dry-run].

Times, on the card of this machine, every configuration that `config.choose` of an operation could return for a shape
and that `make aot` has verified, beside the one its rule returns. What beats the rule by more than 2 % goes into
sarqc_kernels/<op>/tuned/sm_<arch>.json, where `choose` finds it; shapes where the rule is as good get no entry. A shape
that is not reached in time keeps the entry it had. Codes may change with a table: it is part of the version.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.budget import Budget
from benchmarks.ops import OPS, columns, gram
from benchmarks.ops.base import Call, Inputs, Point
from benchmarks.ops.w4a16 import GROUP
from benchmarks.timing import COLD_BYTES, copies_for, in_turns, percentiles, ready
from sarqc_kernels import repack
from sarqc_kernels.columns import config as columns_config
from sarqc_kernels.device import Device, device_info, triton_unsupported
from sarqc_kernels.gram import config as gram_config
from sarqc_kernels.tuned import choices, table_path
from sarqc_kernels.w4a16 import config as w4a16_config
from sarqc_kernels.w4a16.layout import TILES

RULE = "the rule"
GAIN = 0.02  # below it a difference between two runs is noise
SECONDS_OF_A_TRIAL = 0.1  # of the clock for each configuration


@dataclass(frozen=True)
class Trial:
    """A call of an op whose configuration can be chosen.

    key: of the call in the table. values: every entry that could stand there, by a name to show; `RULE` is what the
    rule says. bind: (entry, inputs) -> a call that runs by it.
    """

    op: str
    key: str
    values: Mapping[str, dict[str, Any]]
    bind: Callable[[dict[str, Any], Inputs], Call]


def of_gram(point: Point, card: Device) -> list[Trial]:
    sizes = [point.sizes[name] for name in ("experts", "tokens", "inputs")]
    even = point.sizes["inputs"] % 16 == 0
    known = gram_config.tiles(card.arch, torch.bfloat16, even)
    entries: dict[str, dict[str, Any]] = {}
    for name, tile in known.items():
        for splits in (1, 2, 4, 8, gram_config.MOST_SPLITS):
            if gram_config.plan_of(tile, *sizes, card, splits).splits == splits:
                entries[f"{name}, {splits} splits"] = {"tile": name, "splits": splits}
    chosen = gram_config.rule(*sizes, torch.bfloat16, card, even)
    named = next(name for name, other in known.items() if other == chosen.tile)
    entries[RULE] = {"tile": named, "splits": chosen.splits}  # which need not be a power of two

    def bind(entry: dict[str, Any], inputs: Inputs) -> Call:
        from sarqc_kernels.gram.triton_impl import launch

        plan = gram_config.plan_of(known[entry["tile"]], *sizes, card, entry["splits"])
        sums = gram.sums(inputs)
        return lambda: launch(plan, *sums, inputs["x"], inputs["offsets"])

    return [Trial("gram", gram_config.key(*sizes, torch.bfloat16, even), entries, bind)]


def of_columns(point: Point, card: Device) -> list[Trial]:
    experts, rows = point.sizes["experts"], point.sizes["rows"]
    known = columns_config.tiles(card)
    entries = {name: {"tiles": name} for name in known}
    chosen = columns_config.rule(experts, rows, card)
    entries[RULE] = next({"tiles": name} for name, result in known.items() if result == chosen)

    def bind(entry: dict[str, Any], inputs: Inputs) -> Call:
        from sarqc_kernels.columns import GridRule, Problem, panels, triton_impl

        steps = triton_impl.Steps(known[entry["tiles"]])
        matrix, rule = columns.factor(inputs["hessian"]), GridRule(**columns.RULE)
        grid = (inputs["scales"], inputs["zeros"])
        problem = Problem(inputs["weight"], matrix, None, *grid, columns.GROUP, rule)
        return lambda: panels.quantize(steps, problem)

    return [Trial("columns", columns_config.key(experts, rows), entries, bind)]


def of_w4a16(point: Point, card: Device) -> list[Trial]:
    sizes = point.sizes
    if sizes["bits"] != 4:
        return []  # tables are of 4 bits
    return [_product(("x", ""), (sizes["tokens"], sizes["outputs"], sizes["inputs"], GROUP, 0), card)]


def of_moe(point: Point, card: Device) -> list[Trial]:
    sizes = point.sizes
    rows, experts = sizes["tokens"] * sizes["chosen"], sizes["experts"]
    up = (rows, 2 * sizes["inner"], sizes["hidden"], GROUP, experts)
    down = (rows, sizes["hidden"], sizes["inner"], GROUP, experts)
    return [_product(("x", "up_"), up, card), _product(("h", "down_"), down, card)]


def _product(names: tuple[str, str], shape: tuple[int, int, int, int, int], card: Device) -> Trial:
    """names: of the activations, and the prefix of the weight."""
    source, side = names
    plans = {**w4a16_config.candidates(*shape, card), RULE: w4a16_config.rule(*shape, card)}

    def bind(entry: dict[str, Any], inputs: Inputs) -> Call:
        from sarqc_kernels.w4a16.triton.launch import run

        x, offsets, packed = inputs[source], inputs.get("offsets"), f"{side}packed"
        if packed not in inputs:  # one for all candidates: they read the same k_tiles
            codes, scales = inputs[f"{side}codes"], inputs[f"{side}scales"]
            inputs[packed] = repack(codes, scales, None, bits=4, dtype=x.dtype, device=x.device, layout=TILES)
        return lambda: run(plans[entry["plan"]], x, inputs[packed], offsets, None)

    return Trial("w4a16", w4a16_config.key(*shape), {name: {"plan": name} for name in plans}, bind)


TRIALS: dict[str, Callable[[Point, Device], list[Trial]]] = {
    "gram": of_gram, "columns": of_columns, "w4a16": of_w4a16, "moe": of_moe,
}  # fmt: skip


def best(seconds: Mapping[str, float]) -> str | None:
    """The name with the least time, or None where the rule's is within `GAIN` of it."""
    winner = min(seconds, key=lambda name: seconds[name])
    return winner if seconds[winner] < (1 - GAIN) * seconds[RULE] else None


def tune(op: str, device: torch.device, budget: Budget, quick: bool = False) -> dict[str, dict[str, Any] | None]:
    """Entries by key for the points of an op: what to take, or None where the rule is as good."""
    tuned: dict[str, dict[str, Any] | None] = {}
    for point in sorted(OPS[op].points(quick), key=lambda point: point.rank):
        trials = TRIALS[op](point, device_info(device))
        if not trials:
            continue
        if not budget.has_time():
            print(f"[{budget}] {op} {point.name}: left out", flush=True)
            continue
        with budget.step():
            generator = torch.Generator(device).manual_seed(0)
            copies = copies_for(point.traffic, 0 if quick else COLD_BYTES)
            inputs = [OPS[op].inputs(point, device, generator) for _ in range(copies)]
            for trial in trials:
                if trial.key not in tuned:
                    tuned[trial.key] = _decide(trial, inputs, device, f"[{budget}] {op} {point.name}")
    return tuned


def _decide(trial: Trial, inputs: Sequence[Inputs], device: torch.device, label: str) -> dict[str, Any] | None:
    turns = {name: ready([trial.bind(entry, each) for each in inputs], device) for name, entry in trial.values.items()}
    in_turns(turns, SECONDS_OF_A_TRIAL)
    seconds = {name: percentiles(turn.samples)["p50"] for name, turn in turns.items()}
    winner = best(seconds)
    shown = ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in sorted(seconds.items(), key=lambda x: x[1])[:4])
    print(f"{label}: {winner or 'as the rule has it'}; {shown}", flush=True)
    return trial.values[winner] if winner else None


def write(op: str, arch: int, result: Mapping[str, dict[str, Any] | None], made_on: Mapping[str, Any]) -> None:
    """Join what was found with the table that stands; an op whose table would be empty has none."""
    kept = {name: dict(entry) for name, entry in choices(op, arch).items() if name not in result}
    table = dict(sorted({**kept, **{name: entry for name, entry in result.items() if entry}}.items()))
    path = table_path(op, arch)
    if not table:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    head = {name: made_on[name] for name in ("gpu", "driver", "versions", "commit", "when")}
    path.write_text(json.dumps({"made": head, "choices": table}, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(table)} entries", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*TRIALS, "all"])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written")
    options = parser.parse_args(arguments)
    device, budget = machine.device_of(options.device), Budget(options.minutes)
    if reason := triton_unsupported(torch.empty(0, device=device)):
        raise SystemExit(f"nothing to tune: {reason}")
    if device.type != "cuda":
        raise SystemExit("nothing to tune: a table is of a card, and the interpreter's times mean nothing")
    made_on, arch = machine.facts(device, options.commit), device_info(device).arch
    chosen = list(TRIALS) if options.what == "all" else [options.what]
    for number, op in enumerate(chosen):
        share = Budget(budget.left() / 60 / (len(chosen) - number))
        tuned = tune(op, device, share)
        if not options.dry_run:
            write("w4a16" if op == "moe" else op, arch, tuned, made_on)
            choices.cache_clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
