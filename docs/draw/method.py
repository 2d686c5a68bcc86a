"""Pictures of the method: what is minimised, the walk over the blocks, and what was measured."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

from benchmarks.readme import picture_rows
from docs.draw.canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PALE_BLUE, PALE_ORANGE, Canvas, Point

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

Matrix = tuple[float, float, float]
"""a, b, c of the symmetric [[a, b], [b, c]]."""

WEIGHT = (0.45, 0.20)  # in steps of the grid
HESSIAN: Matrix = (1.0, 1.2586, 1.6)  # two inputs whose correlation is 0.995
LAMBDA = 0.5  # D is diag(H)
REACH = 3


def cost(hessian: Matrix, x: float, y: float) -> float:
    """The cost of an error (x, y)."""
    a, b, c = hessian
    return a * x * x + 2 * b * x * y + c * y * y


def best(hessian: Matrix) -> tuple[int, int]:
    """The grid point that costs least."""
    steps = range(-REACH, REACH + 1)
    grid = product(steps, steps)
    return min(grid, key=lambda at: cost(hessian, at[0] - WEIGHT[0], at[1] - WEIGHT[1]))


def ellipse(hessian: Matrix, level: float) -> list[Point]:
    """Points (x, y) around the weight at which an error costs `level`: L^-T of a circle, L L^T the Hessian."""
    a, b, c = hessian
    corner = math.sqrt(a)
    below, last = b / corner, math.sqrt(c - b * b / a)
    items = []
    for turn in range(145):
        across, up = (math.sqrt(level) * part(2 * math.pi * turn / 144) for part in (math.cos, math.sin))
        y = up / last
        items.append((WEIGHT[0] + (across - below * y) / corner, WEIGHT[1] + y))
    return items


def objective() -> str:
    """Two weights, their grid, and the code that costs least without and with the regulariser."""
    picture = Canvas(720, 366, "the cost of rounding two weights, without and with the regulariser")
    held = 1 + LAMBDA
    regularised = (held * HESSIAN[0], HESSIAN[1], held * HESSIAN[2])
    panels = (("calibration alone:  H", HESSIAN, ORANGE), ("regularised:  H + λD", regularised, BLUE))
    for panel, (title, hessian, colour) in enumerate(panels):

        def place(x: float, y: float, left: float = 31 + 350 * panel) -> Point:
            return left + (x + 3.5) * 44, 49 + (3.3 - y) * 44

        picture.text((185 + 350 * panel, 28), title, colour, "middle", 15)
        chosen = best(hessian)
        least = cost(hessian, chosen[0] - WEIGHT[0], chosen[1] - WEIGHT[1])
        for times in (1, 4, 12):
            for piece in inside(ellipse(hessian, times * least)):
                picture.lines([place(*at) for at in piece], colour, 2 if times == 1 else 1)
        for x, y in product(range(-REACH, REACH + 1), repeat=2):
            picture.dot(place(x, y), 3, FAINT)
        picture.dot(place(*chosen), 7, colour)
        picture.dot(place(*WEIGHT), 5, INK)
        picture.text((place(*WEIGHT)[0] + 6, place(*WEIGHT)[1] - 10), "W")
        picture.text((place(*chosen)[0] + 10, place(*chosen)[1] + 18), "chosen", colour)
    return picture.svg()


def inside(points: list[Point]) -> list[list[Point]]:
    """The stretches of a curve that lie inside of the panel."""
    pieces: list[list[Point]] = [[]]
    for at in points:
        if max(abs(at[0]), abs(at[1])) <= REACH + 0.4:
            pieces[-1].append(at)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if len(piece) > 1]


def flow() -> str:
    """One forward pass, suspended at each site of a block."""
    picture = Canvas(720, 250, "micro-batches wait at a site, which is quantized from their inputs; then they continue")
    picture.text((20, 26), "one block: q/k/v, o, gate/up, down are its sites", size=14)
    sites = ("q, k, v", "o", "gate, up", "down")
    for number, name in enumerate(sites):
        left, done, here = 150 + 130 * number, number < 2, number == 2
        fill = PALE_BLUE if done else PALE_ORANGE if here else GREY
        picture.rect((left, 44), (92, 40), fill, ORANGE if here else FAINT, 2 if here else 1)
        picture.text((left + 46, 69), name, BLUE if done else INK, "middle")
        state = "quantized" if done else "being quantized" if here else "original weight"
        picture.text((left + 46, 102), state, BLUE if done else ORANGE if here else FAINT, "middle", 12)
    for row in range(3):
        y = 132 + 22 * row
        picture.text((20, y + 5), f"micro-batch {row + 1}", size=12)
        picture.arrow((112, y), (406, y), BLUE)
        picture.rect((406, y - 7), (5, 14), ORANGE, ORANGE)
    picture.text((424, 142), "all wait here:", ORANGE)
    picture.text((424, 159), "their inputs make the Gram,", ORANGE)
    picture.text((424, 176), "the weight becomes the quantized one,", ORANGE)
    picture.text((424, 193), "and they continue with it", ORANGE)
    picture.text(
        (20, 222), "after the block: one final shard is written; the next block's weights are prefetched", GREEN
    )
    picture.text((20, 240), "with error correction, a full-precision stream passes each block first", FAINT)
    return picture.svg()


SHOWN = {"rtn": "RTN", "llm-compressor gptq": "llm-compressor", "GPTQModel": "GPTQModel", "sarqc-gptq": "SARQC"}
"""Method in the results -> its name in the picture."""


def quality() -> str:
    """Perplexity at 3 bits over the number of calibration sequences, from the committed results."""
    results = json.loads((RESULTS / "whole-smollm2.json").read_text(encoding="utf-8"))
    text = next(entry for entry in results["protocol"]["texts"] if entry["text"] == "wikitext.txt")
    curves: dict[str, list[tuple[int, float]]] = {"llm-compressor gptq": [], "sarqc-gptq": []}
    for row in results["rows"]:
        if (row["bits"], row["text"]) == (3, text["text"]) and row["method"] in curves:
            curves[row["method"]].append((row["windows"], row["perplexity"]))
    picture = Canvas(720, 330, "perplexity at 3 bits over calibration sequences")
    windows = sorted({count for curve in curves.values() for count, _ in curve})

    def place(count: float, perplexity: float) -> Point:
        across = math.log(count / windows[0]) / math.log(windows[-1] / windows[0])
        return 90 + 440 * across, 270 - 220 * math.log(perplexity / 16) / math.log(200 / 16)

    for level in (20, 50, 100, 200):
        y = place(windows[0], level)[1]
        picture.lines([(80, y), (540, y)], GREY)
        picture.text((72, y + 4), str(level), FAINT, "end")
    base = place(windows[0], text["perplexity"])[1]
    picture.lines([(80, base), (540, base)], GREEN, 1, "5 4")
    picture.text((552, base + 10), f"unquantized, {text['perplexity']:.1f}", GREEN)
    for (name, curve), colour in zip(curves.items(), (ORANGE, BLUE)):
        points = [place(*point) for point in sorted(curve)]
        picture.lines(points, colour, 2)
        for point, (_, perplexity) in zip(points, sorted(curve)):
            picture.dot(point, 4, colour)
            picture.text((point[0], point[1] - 11), f"{perplexity:.1f}", colour, "middle")
        picture.text((552, points[-1][1]), SHOWN[name], colour)
    for count in windows:
        picture.text((place(count, 16)[0], 292), str(count), anchor="middle")
    picture.text((310, 316), "calibration sequences of 512 tokens (both axes logarithmic)", anchor="middle")
    picture.text((20, 28), "perplexity on held-out articles, SmolLM2-135M at 3 bits, groups of 64", size=14)
    return picture.svg()


def perplexity() -> str:
    """The README's picture: perplexity at 4, 3 and 2 bits. A bar begins at the unquantized model's perplexity."""
    unquantized, rows = picture_rows()
    top = max(row["perplexity"] for each in rows.values() for row in each.values())
    picture = Canvas(840, 72 + 100 * len(rows), "perplexity at 4, 3 and 2 bits of four tools and the unquantized model")
    left, right = 214, 740

    def place(value: float) -> float:
        return left + (right - left) * math.log(value / unquantized) / math.log(top / unquantized)

    picture.text((20, 30), "Perplexity on held-out text (lower is better, logarithmic scale)", size=16)
    bottom = 48 + 100 * len(rows)
    for power in range(2, math.floor(math.log10(top)) + 1):
        x = place(10**power)
        picture.lines([(x, 48), (x, bottom)], GREY)
        picture.text((x, bottom + 16), f"{10**power:,}", FAINT, "middle", 12)
    for number, (bits, each) in enumerate(sorted(rows.items(), reverse=True)):
        upper = 54 + 100 * number
        picture.text((20, upper + 50), f"{bits} bits", size=20)
        for at, (name, label) in enumerate(SHOWN.items()):
            row, y = each[name], upper + 22 * at
            ours = name == "sarqc-gptq"
            end = place(row["perplexity"])
            picture.text((left - 8, y + 14), label, BLUE if ours else INK, "end", 14)
            picture.rect((left, y + 2), (max(end - left, 1), 16), BLUE if ours else "#b0bec5", "none", 0)
            value = row["perplexity"]
            shown = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
            picture.text((end + 6, y + 15), shown, BLUE if ours else INK, size=14)
    picture.lines([(left, 48), (left, bottom)], GREEN, 2)
    picture.text((left + 12, bottom + 16), f"unquantized {unquantized:.1f}", GREEN, "end", 13)
    return picture.svg()
