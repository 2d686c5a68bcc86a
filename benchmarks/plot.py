"""Draw results: python -m benchmarks.plot results.jsonl [--out FOLDER]. One picture for each operation in the file.

The axis is the share of the measured roof, and the roof is the black line at 100 %. Where a weight is measured for many
numbers of tokens, a panel for each weight has a curve for each contender; elsewhere every shape is a row with a mark
for each contender, from p20 to p80. Ours are filled, rivals hollow, goals (for an H200) grey. Below the picture stands
what is not in it, and why.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import of_status, read

OURS = ("#0b6e4f", "#3fa34d", "#8ac926")
RIVALS = ("#d1495b", "#e08e45", "#6d597a", "#2e6f95", "#8d99ae")
MARKS = "os^Dv"
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 1.0)
TITLES = {"gram": "Gram accumulation", "columns": "Column quantization with its factorisation",
          "w4a16": "W4A16 matmul, dense", "moe": "W4A16 matmul by experts"}  # fmt: skip

Records = Sequence[dict[str, Any]]


def draw(op: str, records: Records, path: Path) -> None:
    """One picture of the records of `op`; there is at least one that is timed."""
    from matplotlib.figure import Figure

    whole = [record for record in of_status(records, "timed") if record["part"] == "whole"]
    styles = _styles(whole)
    weights: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in sorted(whole, key=lambda r: r["rank"]):
        others = tuple((name, size) for name, size in record["sizes"].items() if name != "tokens")
        weights.setdefault(others, []).append(record)
    if op in ("w4a16", "moe"):
        across = min(3, len(weights))
        down = -(-len(weights) // across)
        figure = Figure(figsize=(2 + 3.6 * across, 1.6 + 3.0 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
        least = min(record["share"] for record in whole)  # the panels share an axis
        for panel, (others, mine) in zip(panels, weights.items()):
            _curves(panel, " ".join(f"{name} {size}" for name, size in others), mine, styles, least)
        for panel in panels[len(weights) :]:
            panel.set_visible(False)
    else:
        figure = Figure(figsize=(10, 1.6 + 0.45 * len({r["point"] for r in whole})), layout="constrained")
        panels = figure.subplots(1, 1, squeeze=False).ravel()
        _rows(panels[0], whole, styles)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(f"{TITLES.get(op, op)}: {_machine(whole[0])}", x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.supxlabel(_caption(records, whole), x=0.01, ha="left", fontsize=8, color="#444444")
    figure.savefig(path, dpi=150)


def _styles(whole: Records) -> dict[str, dict[str, Any]]:
    """Colour and mark of every contender, ours first."""
    ours = {record["contender"]: record["ours"] for record in whole}
    styles: dict[str, dict[str, Any]] = {}
    for mine, colors in ((True, OURS), (False, RIVALS)):
        for index, name in enumerate(name for name, own in ours.items() if own == mine):
            color = colors[index % len(colors)]
            styles[name] = {"color": color, "marker": MARKS[index % len(MARKS)],
                           "markerfacecolor": color if mine else "white"}  # fmt: skip
    return styles


def _rows(axes: Any, whole: Records, styles: dict[str, dict[str, Any]]) -> None:
    """Every shape a row, every contender a mark from p20 to p80."""
    order = sorted(whole, key=lambda r: (r["rank"], r["roof_seconds"]))
    points = list(dict.fromkeys(record["point"] for record in order))
    for index, (name, style) in enumerate(styles.items()):
        mine = [record for record in whole if record["contender"] == name]
        places = [points.index(record["point"]) + 0.5 * ((index + 0.5) / len(styles) - 0.5) for record in mine]
        shares = [[record["roof_seconds"] / record["seconds"][p] for record in mine] for p in ("p80", "p50", "p20")]
        spread = [[b - a for a, b in zip(shares[0], shares[1])], [c - b for b, c in zip(shares[1], shares[2])]]
        axes.errorbar(shares[1], places, xerr=spread, linestyle="", markersize=7, elinewidth=1, label=name, **style)
    goals = {record["point"]: _goal(record) for record in whole if _goal(record)}
    if goals:
        places = [points.index(point) for point in goals]
        axes.plot(list(goals.values()), places, "|", color="#888888", markersize=18, label="goal")
    labels = {record["point"]: f"{record['point']}\n{_least(record)}" for record in whole}
    axes.set_yticks(range(len(points)), [labels[point] for point in points], fontsize=9)
    axes.set_ylim(len(points) - 0.5, -0.5)
    _share_axis(axes, "x", min(record["share"] for record in whole))
    axes.tick_params(axis="y", length=0)


def _curves(axes: Any, title: str, mine: Records, styles: dict[str, dict[str, Any]], least: float) -> None:
    """One weight: shares over the number of tokens."""
    for name, style in styles.items():
        result = sorted((r["sizes"]["tokens"], r["share"]) for r in mine if r["contender"] == name)
        axes.plot([x for x, _ in result], [y for _, y in result], linewidth=1.3, markersize=5, label=name, **style)
    goals = sorted({(record["sizes"]["tokens"], _goal(record)) for record in mine if _goal(record)})
    if goals:
        axes.plot([x for x, _ in goals], [y for _, y in goals], "_", color="#888888", markersize=14, label="goal")
    axes.set_xscale("log", base=2)
    tokens = sorted({record["sizes"]["tokens"] for record in mine})
    axes.set_xticks(tokens, list(map(str, tokens)), fontsize=8, rotation=45)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("tokens", fontsize=8)
    _share_axis(axes, "y", least)


def _share_axis(axes: Any, which: str, least: float) -> None:
    """A logarithmic axis of shares up to the roof, with a line for the roof."""
    ticks = [tick for tick in TICKS if tick > least / 1.6]
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(max(1e-4, least / 1.6), 1.6)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{100 * tick:g} %" for tick in ticks], fontsize=8)
    (axes.axvline if which == "x" else axes.axhline)(1.0, color="black", linewidth=1.2)
    axes.minorticks_off()
    axes.grid(axis=which, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _goal(record: dict[str, Any]) -> float | None:
    if record["goal_seconds"]:
        return float(record["roof_seconds"] / record["goal_seconds"])
    return record["goal_share"]


def _least(record: dict[str, Any]) -> str:
    least = record["roof_seconds"]
    unit, size = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if least >= s or u == "us")
    return f"roof {least / size:.3g} {unit}, {record['bound']}"


def _machine(record: dict[str, Any]) -> str:
    roof, name = record["roof"], record["gpu"] or record["cpu"]
    return f"{name}, {roof['bandwidth'] / 1e12:.2g} TB/s and {roof['flops'] / 1e12:.3g} TFLOP/s measured"


def _caption(records: Records, whole: Records) -> str:
    """What is behind the numbers, and what is not in the picture."""
    first = whole[0]
    how = dict.fromkeys(record["how"].split(" (")[0] for record in whole)
    lines = [f"Share of the measured roof, medians. torch {first['versions']['torch']}, commit {first['commit']}, "
             f"timed by {' and '.join(how)}{'' if first['tested'] else ', tests skipped'}."]  # fmt: skip
    seen = {record["contender"] for record in of_status(records, "timed")}
    why: dict[str, str] = {}
    for record in records:
        if record["status"] in ("absent", "failed", "wrong") and record["contender"] not in seen:
            why.setdefault(record["contender"], record["reason"])
    for reason in dict.fromkeys(why.values()):
        lines.append(f"Not here: {', '.join(name for name, own in why.items() if own == reason)}: {reason}.")
    parts = dict.fromkeys(r["contender"] for r in of_status(records, "timed") if r["part"] != "whole")
    lines += [f"In the file beside these: {', '.join(parts)}."] if parts else []
    left = len(of_status(records, "left out"))
    return "\n".join([*lines, *([f"{left} shapes were left out for want of time."] if left else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the pictures; default beside the results")
    options = parser.parse_args(arguments)
    if not options.results.is_file():
        raise SystemExit(f"{options.results} is not there: python -m benchmarks.run writes it")
    folder = options.out or options.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    records = read(options.results)
    whole = [record for record in of_status(records, "timed") if record["part"] == "whole"]
    if not whole:
        raise SystemExit(f"{options.results} holds no timed records: nothing to draw")
    for op in dict.fromkeys(record["op"] for record in whole):
        path = folder / f"{options.results.stem}-{op}.png"
        draw(op, [record for record in records if record["op"] == op], path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
