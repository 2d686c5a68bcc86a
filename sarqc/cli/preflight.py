"""An estimate on a terminal: layers, memory, time, disk, and which runtimes support the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sarqc.cli.options import facts

if TYPE_CHECKING:
    from sarqc.estimation.preflight import Preflight
    from sarqc.serving.rules import RuntimeSupport


def show(console: Console, preflight: Preflight) -> None:
    """Print everything that is known before a run."""
    from sarqc.report.summary import human

    title = f"[bold]{escape(preflight.model)}[/]  {preflight.architecture}, {preflight.headline()}"
    console.print(title, highlight=False, soft_wrap=not console.is_terminal)
    for note in preflight.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    console.print(_layers(preflight))
    known = facts()
    text = f"{preflight.windows} sequences of {preflight.seqlen} tokens" if preflight.windows else "none"
    known.add_row("text", text)
    ranks = f" on {preflight.ranks} ranks" if preflight.ranks > 1 else ""
    known.add_row("runs on", f"{preflight.device} in {preflight.dtype}{ranks}")
    stages = "  ".join(
        f"{one.stage} {human(one.host)}" + (f"+{human(one.device)}" if one.device else "") for one in preflight.memory
    )
    known.add_row("memory", f"{stages}" + ("  (host+device)" if any(one.device for one in preflight.memory) else ""))
    known.add_row("buffers", _buffers(preflight))
    for disk in preflight.disk:
        paths = escape(" and ".join(disk.paths))
        known.add_row("disk", f"{human(disk.needed)} of {human(disk.free)} free, for {paths}")
    spent = "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in preflight.time.seconds.items())
    known.add_row("time", f"{spent}; basis: {preflight.time.basis}")
    console.print(known)
    console.print(_serve(preflight.serve))
    for line, where in _failures(preflight.serve).items():
        console.print(f"[red]fails[/] {escape(line)}  [dim]{'; '.join(where)}[/]", highlight=False)
    for problem in preflight.problems:
        console.print(f"[bold red]refused[/] {escape(problem)}", highlight=False)


def _buffers(preflight: Preflight) -> str:
    from sarqc.report.summary import human

    parts = []
    if preflight.waiting.states:
        parts.append(f"{human(preflight.waiting.states)} of activations in memory")
    if preflight.waiting.mapped:
        parts.append(f"{human(preflight.waiting.mapped)} of activations in a file (over --activation-budget)")
    if preflight.waiting.prefetched:
        parts.append(f"the next block prefetched, {human(preflight.waiting.prefetched)}")
    elif preflight.blocks > 1:
        parts.append("no prefetch: there is no memory for it")
    return "; ".join(parts) or "nothing"


def _layers(preflight: Preflight) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("layers", "count", "shape", ""):
        justify: Literal["left", "right"] = "right" if title == "count" else "left"
        table.add_column(title, justify=justify, no_wrap=title == "layers", overflow="fold")
    for kind in preflight.kinds:
        shape = " x ".join(map(str, kind.shape))
        became = f"left: {escape(kind.left)}" if kind.left else "quantized"
        table.add_row(escape(kind.name), str(kind.count), shape, became)
    return table


def _serve(outlooks: tuple[RuntimeSupport, ...]) -> Table:
    ranks = sorted({one.ranks for one in outlooks})
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("runtime")
    for count in ranks:
        table.add_column(f"tp {count}", overflow="fold")
    for server in dict.fromkeys(one.server for one in outlooks):
        mine = {one.ranks: one for one in outlooks if one.server == server}
        table.add_row(server, *(_cell(mine[count]) for count in ranks))
    return table


def _cell(one: RuntimeSupport) -> str:
    if not one.known:
        return "[dim]not known[/]"
    if one.failures:
        return "[red]fails[/]"
    return ", ".join(f"{kernel} {count}" for kernel, count in one.kernels.items())


def _failures(outlooks: tuple[RuntimeSupport, ...]) -> dict[str, list[str]]:
    """Each reason once, with the servers that have it and on how many ranks."""
    failures: dict[str, dict[str, list[int]]] = {}
    for one in outlooks:
        for line in one.failures:
            failures.setdefault(line, {}).setdefault(one.server, []).append(one.ranks)
    return {
        line: [f"{server} at tp {', '.join(map(str, ranks))}" for server, ranks in places.items()]
        for line, places in failures.items()
    }
