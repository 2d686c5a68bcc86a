"""WikiText-2 as published is tokenised text: this turns it back into prose.

    python -m benchmarks.quality.wikitext wiki.valid.tokens calibration.txt evaluation.txt [--max-unknown 2]

Lines with more unknown words than that are dropped and the spaces around punctuation undone. The first 65 % of the
lines are for calibration, the rest for evaluation; no article is cut in two.
"""

import argparse
import re
from pathlib import Path

_RULES = [
    (r" @([-,.])@ ", r"\1"),  # number and word joiners: "0 @.@ 7" -> "0.7"
    (r" ([.,;:!?%)\]])", r"\1"),
    (r"([(\[$£]) ", r"\1"),
    (r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1"),
    (r"(\w) ' (\w)", r"\1' \2"),
    (r'" ([^"]*?) "', r'"\1"'),
    (r"(\d) \u2013 (\d)", "\\1\u2013\\2"),
    (r" +", " "),
]


def clean(tokenised: str, max_unknown: int = 2) -> list[str]:
    """Prose lines of WikiText in its tokenised form; lines with more than `max_unknown` unknown words are dropped."""
    lines = []
    for line in tokenised.splitlines():
        if line.count("<unk>") > max_unknown or not line.strip():
            continue
        for pattern, replacement in _RULES:
            line = re.sub(pattern, replacement, line)
        lines.append(line.strip())
    return lines


def split(lines: list[str], share: float = 0.65) -> tuple[list[str], list[str]]:
    """Calibration and evaluation lines, cut at the first article title after `share` of the lines."""
    cut = int(len(lines) * share)
    while cut < len(lines) and not re.fullmatch(r"= [^=]+ =", lines[cut]):
        cut += 1
    return lines[:cut], lines[cut:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--max-unknown", type=int, default=2)
    args = parser.parse_args()
    parts = split(clean(args.source.read_text(encoding="utf-8"), args.max_unknown))
    for path, lines in zip((args.calibration, args.evaluation), parts):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {len(lines)} lines")


if __name__ == "__main__":
    main()
