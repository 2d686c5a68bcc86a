"""`python -m benchmarks.run decode`: tokens per second of a decode step, packed W4 and W3 beside bf16, in turns.

The models have the shapes of real ones and random weights, made block by block. Every sequence of the batch has a
context of --context tokens. On a card a step is a CUDA graph; on a CPU it is eager and a small shape, which tests the
harness. At its smallest batch a packed model's logits are first compared with those of its plain torch reference (whose
many launches take too long to do it at each), and one that is wrong is not timed. One JSON line for each shape, batch
and model; its share is of the time that its own bytes take at the measured copy bandwidth (or its flops, where they
take longer).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gate, machine, records
from benchmarks.budget import Budget
from benchmarks.decode import model as models
from benchmarks.ops.base import Call, Contender, Op, Point, Roof, runs_anywhere
from benchmarks.quantize.shapes import MODELS, config_of
from benchmarks.timing import Turn, in_turns, ready

BITS: dict[str, int | None] = {"sarqc W4": 4, "sarqc W3": 3, "transformers bf16": None}
BATCHES = (1, 8, 64)
BY_DEVICE = {"cuda": (("llama-3-8b", "qwen3-30b-a3b"), 1024), "cpu": (("small", "small-moe"), 64)}
SECONDS = {True: 0.02, False: 1.0}  # of the clock for each model at a batch: quick, or not
MOST_ERROR = 0.5  # a wrong product makes it about 1.4; dense models have 0.02, routers near a tie tip over now and then
MEANING = (
    "relative error of the logits at the smallest batch against the same packed model by the reference; none of bf16"
)


def contenders() -> tuple[Contender, ...]:
    """Named for the records; how they are made is `models.made`."""
    return tuple(Contender(name, bits is not None, runs_anywhere, lambda inputs: inputs["call"])
                 for name, bits in BITS.items())  # fmt: skip


OP = Op(
    name="decode",
    tests=("tests/kernels/test_w4a16.py", "tests/kernels/test_w4a16_experts.py", "tests/model/test_build.py"),
    points=lambda quick: [],  # they come from the command line
    inputs=lambda point, device, generator: {},
    contenders=contenders(),
    error=lambda inputs, result: float((result.float() - inputs["right"]).norm() / inputs["right"].norm()),
    most_error=MOST_ERROR,
    meaning=MEANING,
)


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    device, budget = machine.device_of(options.device), Budget(options.minutes, first_guess=1.0)
    shapes, context = BY_DEVICE["cpu" if options.quick else device.type]
    tested = options.tested_before
    out = options.out or machine.place(device, options.quick)
    sink = records.Sink(out, {**machine.facts(device, options.commit), "tested": tested, "quick": options.quick})
    if not (options.skip_tests or tested):
        print(f"[{budget}] tests of decode first", flush=True)
        reason = gate.verdicts({OP.name: OP.tests}, budget.left() / 2)[OP.name]
        if reason:
            sink.add(records.untimed("refused", OP, None, None, reason))
            print(f"[{budget}] decode is not timed: {reason}", flush=True)
            return 1
        sink.facts["tested"] = True
    roof = machine.measure_roof(device, options.quick)
    print(f"[{budget}] roof: {roof.bandwidth / 1e9:.0f} GB/s, {roof.flops / 1e12:.3g} TFLOP/s", flush=True)
    for shape in options.shape or shapes:
        bench = Bench(shape, options.context or context, device, SECONDS[options.quick], roof, sink)
        bench.run(options.batch or BATCHES, budget)
    print(f"[{budget}] {out}", flush=True)
    return 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """One shape. context: tokens of each sequence. seconds: of the clock for each model at a batch."""

    shape: str
    context: int
    device: torch.device
    seconds: float
    roof: Roof
    sink: records.Sink

    def run(self, batches: Sequence[int], budget: Budget) -> None:
        """Make every model once, then time all batches, smallest first; record what cannot be made or has no time."""
        made: dict[str, Any] = {}
        errors: dict[str, float] = {}
        batches = sorted(batches)
        for contender in OP.contenders:
            try:
                made[contender.name] = models.made(self.shape, BITS[contender.name], self.device)
            except RuntimeError as error:  # a card with less memory
                self._left_out("failed", [self.point(batch) for batch in batches], contender, _first_line(error))
        for number, batch in enumerate(batches):
            if not budget.has_time():
                for contender in OP.contenders:
                    rest = [self.point(batch) for batch in batches[number:]]
                    self._left_out("left out", rest, contender, "no time was left")
                print(f"[{budget}] decode: left out {self.shape} batch {batches[number:]}", flush=True)
                return
            with budget.step():
                line = self.measure(made, batch, errors)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # graphs have pools of their own, which the next batch cannot use
            print(f"[{budget}] {self.point(batch).name}: {line}", flush=True)

    def point(self, batch: int, traffic: float = 0.0) -> Point:
        """A batch of this shape; its traffic is that of one model."""
        config = config_of(self.shape, None)
        flops = models.flops_of(config, batch, self.context)
        why = f"a decode step in the shape of {self.shape}, {self.context} tokens of context"
        return Point(f"{self.shape} batch {batch}", why, {"batch": batch, "context": self.context}, flops, traffic)

    def measure(self, made: Mapping[str, Any], batch: int, errors: dict[str, float]) -> str:
        """All models at a batch, in turns; what to show of it. errors: of the models judged before; the others join."""
        turns: dict[str, Turn] = {}
        points: dict[str, Point] = {}
        context: models.Context | None = None  # one for all: a step writes its place in it before it reads it
        for contender in (each for each in OP.contenders if each.name in made):
            name, model = contender.name, made[contender.name]
            try:
                context = context or models.Context(model.config, batch, self.context, self.device)
                points[name] = self.point(batch, models.bytes_of(model, context))
                call = models.step(model, context)
                if contender.ours and name not in errors:
                    errors[name] = _error(call)
                right = not contender.ours or errors[name] <= MOST_ERROR  # NaN is not
                turn = ready([call], self.device) if right else None
            except RuntimeError as error:
                self._left_out("failed", [self.point(batch)], contender, _first_line(error))
                continue
            if turn is None:
                reason = f"{MEANING}: {errors[name]} > {MOST_ERROR}"
                self._left_out("wrong", [points[name]], contender, reason)
            else:
                turns[name] = turn
        in_turns(turns, self.seconds)
        rates: dict[str, float] = {}
        for contender in (each for each in OP.contenders if each.name in turns):
            name, turn = contender.name, turns[contender.name]
            record = records.timed(OP, points[name], contender, turn, self.roof, errors.get(name), copies=1)
            rates[name] = batch / record["seconds"]["p50"]
            self.sink.add(record | {"shape": self.shape, "tokens_per_second": rates[name]})
        return self._shown(rates, points) or "nothing could be timed"

    def _left_out(self, status: str, points: Sequence[Point], contender: Contender, reason: str) -> None:
        for point in points:
            self.sink.add(records.untimed(status, OP, point, contender, reason))

    def _shown(self, rates: Mapping[str, float], points: Mapping[str, Point]) -> str:
        cells = []
        for name, rate in rates.items():
            point = points[name]
            share = self.roof.seconds(point) * rate / point.sizes["batch"]
            cells.append(f"{name} {rate:.4g} tokens/s ({share:.0%} of the roof of {point.traffic / 1e9:.3g} GB)")
        return "  ".join(cells)


def _error(call: Call) -> float:
    """Of the logits of a step, against those of the same step by the reference."""
    with models.by_reference():
        right = call().float()
    return OP.error({"right": right}, call())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run decode", description=__doc__)
    parser.add_argument("--shape", action="append", choices=MODELS, help="again for more; default by the device")
    parser.add_argument("--batch", action="append", type=int, help="sequences of a step; default 1, 8 and 64")
    parser.add_argument("--context", type=int, help="tokens of each sequence; default 1024 on a card, 64 on a CPU")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all of it works")
    parser.add_argument("--skip-tests", action="store_true", help="time without running the tests first")
    parser.add_argument("--out", type=Path, help="file to append to")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--tested-before", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)
