"""`sarqc doctor`."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sarqc.cli.options import JsonOption, facts, loading, print_json, stdout


def doctor(as_json: JsonOption = False) -> None:
    """Show versions and GPUs, which kernels run here and why others do not, and test each kernel.

    Exit code 1 where a self-test fails.
    """
    with loading():
        from sarqc.entrypoints.doctor import examine

    examination = examine()
    if as_json:
        print_json(examination)
    else:
        stdout().print(_render(examination))
    if not examination["healthy"]:
        raise typer.Exit(1)


def _render(examination: dict[str, Any]) -> Group:
    return Group(_machine(examination), Text(), _operations(examination["operations"]), *_footer(examination))


def _machine(examination: dict[str, Any]) -> Table:
    from sarqc.report.summary import human

    table = facts("machine")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in examination["versions"].items()))
    table.add_row("python", f"{examination['machine']['python']} on {examination['machine']['platform']}")
    for gpu in examination["gpus"]:
        memory = f"{human(gpu['free'])} of {human(gpu['memory'])} free"
        table.add_row(gpu["device"], f"{gpu['name']}, sm_{gpu['arch']}, {gpu['multiprocessors']} processors, {memory}")
    if not examination["gpus"]:
        table.add_row("GPU", "none: everything runs on the CPU")
    csrc = examination["csrc"]
    table.add_row("nvcc", csrc["nvcc"])
    for device, state in csrc["libraries"].items():
        table.add_row(f"csrc {device}", state)
    free = examination["free"]
    table.add_row("free", f"memory {human(free['memory'])}; disk {human(free['here'])} here, {human(free['cache'])} at "
                          f"the cache {csrc['cache']}")  # fmt: skip
    for variable, value in examination["environment"].items():
        table.add_row("set", f"{variable}={value}")
    return table


def _operations(verdicts: list[dict[str, Any]]) -> Table:
    table = Table(title="operations (the one that runs is marked)", title_justify="left", title_style="bold", box=None,
                  padding=(0, 2, 0, 0))  # fmt: skip
    for name in ("operation", "device", "implementation", "self-test, or why it does not run"):
        table.add_column(name, overflow="fold", no_wrap=name in ("operation", "device"), header_style="dim")
    last: tuple[str, str] | None = None
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for verdict in verdicts:  # implementations that one reason keeps from running share a line
        alone = verdict["backend"] if verdict["reason"] is None else verdict["reason"]
        op = ", ".join(filter(None, (verdict["op"], verdict["case"])))
        lines.setdefault((op, verdict["device"], alone), []).append(verdict)
    for (op, device, _), same in lines.items():
        chosen, where = same[0]["chosen"], (op, device)
        names = ", ".join(verdict["backend"] for verdict in same)
        shown = Text(f"{'>' if chosen else ' '} {names}", "bold" if chosen else "")
        table.add_row(*(("", "") if where == last else where), shown, _status(same[0]))
        last = where
    return table


def _status(verdict: dict[str, Any]) -> Text:
    if verdict["reason"] is not None:
        return Text(verdict["reason"], "dim")
    if verdict["failed"] is not None:
        return Text(f"FAILED: {verdict['failed']}", "bold red")
    return Text(f"ok, off by {verdict['error']:.1e} in {verdict['seconds']:.1f} s", "green")


def _footer(examination: dict[str, Any]) -> list[Text]:
    lines = [Text(f"known trouble: {warning}", "yellow") for warning in examination["warnings"]]
    if not examination["healthy"]:
        lines.append(Text("a self-test failed: results of that implementation cannot be trusted", "bold red"))
    return lines
