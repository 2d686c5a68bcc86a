"""`sarqc eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sarqc.cli.flags import with_options
from sarqc.cli.options import JsonOption, ModelArgument, loading, print_json, print_line, stderr, stdout
from sarqc.config_compare import EVALUATE, SEQLEN


@with_options(*EVALUATE)
def evaluate(
    model: ModelArgument,
    given: dict[str, Any],
    save: Annotated[
        bool,
        typer.Option("--save", help="Measure the original too, and put both into the checkpoint's report and card."),
    ] = False,
    original: Annotated[
        str | None, typer.Option(help="With --save: where the original is now, if not where it was.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval instead, with commas between; `cloze` is made from --text.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity or zero-shot tasks of a model, quantized or not."""
    from sarqc.errors import ArgumentError

    if tasks is not None and not tasks.strip(", "):
        raise ArgumentError(f"--tasks {tasks!r} names none: give names with commas between")
    if tasks and save:
        raise ArgumentError("--save puts perplexity into the report: leave out --tasks, or run twice")
    if original is not None and not save:
        raise ArgumentError(f"--original {original!r} has no effect alone: give --save too, or leave it out")
    if "limit" in given and not tasks:
        raise ArgumentError(
            f"--limit {given['limit']} has no effect without --tasks: give those, or --max-windows for perplexity"
        )
    if tasks:
        _zero_shot(model, [name for task in tasks.split(",") if (name := task.strip())], given, as_json)
    elif save:  # beside the original, block by block, both expanded
        _save(model, original, given, as_json)
    else:
        _show(model, given, as_json)


def _zero_shot(model: str, tasks: list[str], how: dict[str, Any], as_json: bool) -> None:
    with loading():
        from sarqc.entrypoints.evaluate import zero_shot

    results = zero_shot(model, tasks, **how)
    if as_json:
        print_json({"model": model, "tasks": results})
        return
    for task, metrics in results.items():
        print(f"{task}: {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}")


def _show(model: str, how: dict[str, Any], as_json: bool) -> None:
    from dataclasses import asdict

    from sarqc.cli.terminal import Ticker

    with loading():
        from sarqc.entrypoints.evaluate import evaluate as run

    with Ticker(stderr()) as ticker:

        def on_window(done: int, total: int, so_far: float) -> None:
            if done == 1:
                ticker.begin("sequences", total)
            ticker.advance(f"perplexity {so_far:.3f}")

        result = run(model, on_window=on_window, **how)
    if as_json:
        print_json({"model": model} | asdict(result))
        return
    windows = result.protocol["windows"]
    form = f"{'packed' if result.protocol['packed'] else 'dense'} weights, {result.protocol['dtype']}"
    length = _length(result.protocol["seqlen"], how)
    about = f"{windows} sequences of {length} of {result.protocol['text']}, {form}, {result.seconds:.0f} s"
    print_line(stdout(), f"perplexity {result.perplexity:.3f}  ({about})")


def _length(seqlen: int, how: dict[str, Any]) -> str:
    """How long a sequence was; that it is shorter than usual, where nobody chose it."""
    chosen = how.get("seqlen") is not None or seqlen == SEQLEN
    return f"{seqlen} tokens" + ("" if chosen else " (all positions of the model)")


def _save(model: str, original: str | None, how: dict[str, Any], as_json: bool) -> None:
    from sarqc.cli.terminal import Ticker

    with loading():
        from sarqc.entrypoints.evaluate import evaluate_and_save

    with Ticker(stderr()) as ticker:

        def on_block(done: int, total: int) -> None:
            if not done:
                ticker.begin("blocks", total)
            else:
                ticker.advance("original" if done <= total // 2 else "quantized")

        result = evaluate_and_save(model, original=original, on_block=on_block, **how)
    entry = result.entry
    if as_json:
        print_json({"model": model, "card": result.card} | entry)
        return
    print_line(
        stdout(),
        f"perplexity {entry['before']:.3f} -> {entry['after']:.3f}, next token agrees {entry['agreement']:.1%}, "
        f"KL {entry['kl']:.4f}  ({entry['windows']} sequences of {_length(entry['seqlen'], how)} of {entry['text']}, "
        f"both in {entry['dtype']})",
    )
    card = "" if result.card else "; README.md was edited and is left as it is"
    print(f"saved in {model}/report.json and report.html{card}")
