"""`sarqc chat`."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sarqc.cli.options import DeviceOption, DtypeOption, ExpandedOption, ModelArgument, TrustOption, loading, stderr

if TYPE_CHECKING:
    from rich.console import Console

    from sarqc.entrypoints.generate import Chat

COMMANDS = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


def chat(
    model: ModelArgument,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token; higher is more varied.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampling at temperatures above 0.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    expanded: ExpandedOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Chat with a model in the terminal. Piped lines are answered one by one; only answers are printed."""
    with loading():
        from sarqc.entrypoints.generate import open_chat

    conversation = open_chat(
        model,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        packed=not expanded,
        trust_remote_code=trust_remote_code,
    )
    aside = stderr()
    if sys.stdin.isatty():
        how = "its chat template" if conversation.has_template else "no chat template: it continues your text"
        aside.print(f"{model} ({how}). {COMMANDS}.", style="dim", highlight=False, markup=False)
    for line in _lines(aside):
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            aside.print(f"{line.split()[0]} is no command: {COMMANDS}", style="dim", highlight=False, markup=False)
        elif line:
            _answer(conversation, line, aside)


def _lines(aside: Console) -> Iterator[str]:
    """What the user says, until it ends: from a terminal with a prompt, from a pipe without."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no text in this encoding
        yield from (line.strip() for line in sys.stdin)
        return
    while True:
        try:
            yield input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            aside.print(f"\n{COMMANDS}", style="dim", highlight=False)


def _answer(conversation: Chat, line: str, aside: Console) -> None:
    """Print an answer as it comes; on a terminal also how fast it came, and Ctrl-C ends the answer alone."""
    from sarqc.errors import ArgumentError

    began = time.perf_counter()
    answer = conversation.say(line)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except ArgumentError as error:  # the conversation has become too long: say so, and let the user begin anew
        if not sys.stdin.isatty():
            raise
        aside.print(str(error), style="dim", highlight=False, markup=False)
    finally:
        answer.close()  # the history keeps what was said
    print(flush=True)
    if sys.stdin.isatty():
        seconds = time.perf_counter() - began
        rate = f"{conversation.produced} tokens, {conversation.produced / seconds:.1f} a second"
        aside.print(rate, style="dim", highlight=False)
