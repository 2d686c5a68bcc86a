"""Text to windows of tokens, and a fingerprint that says which.

Text comes from a file, from a data set by name (through `datasets`), or from the language reference that CPython
ships (`builtin`), which needs no network. The reference is split by topic into a part to calibrate on and a part to
judge on, so that the two share no topic.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sarqc.config import check_seed
from sarqc.errors import ArgumentError, TextError
from sarqc.model import text_files
from sarqc.model.tokenizer import encode

BUILTIN, GIVEN, GIVEN_TEXTS, GIVEN_CHATS = "builtin", "given tokens", "given texts", "given conversations"
NAMELESS = (GIVEN, GIVEN_TEXTS, GIVEN_CHATS)
"""What data is called that was given in Python and has no name."""
Part = Literal["calibration", "evaluation"]
MOST_TEXT = 1 << 26
"""Characters of a text that are looked at, from its start: some 16 million tokens, to draw a few hundred thousand from.
A data set can have a thousand times as many."""
WHOLE = 1 << 22
"""Characters up to which a text is made tokens in one go, as a cut can change the token beside it."""
STRETCH = 1 << 20
"""Characters of a longer one that are made tokens at a time: a tokenizer takes 150 times as many bytes."""


@dataclass(frozen=True)
class Windows:
    """Windows of one text that do not overlap.

    tokens: int64 [S, L], every window full. bos: whether each begins with the tokenizer's first token.
    text: where the text came from. available: how many windows it had before some were chosen. characters: how many of
    the text were looked at, from its start; None where tokens were given.
    """

    tokens: Tensor
    bos: bool
    text: str
    available: int
    characters: int | None = None

    @classmethod
    def of_tokens(cls, tokens: Tensor, text: str = GIVEN) -> Windows:
        """Windows of the caller's own tokens, int64 [S, L]."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise ArgumentError(
                f"tokens are {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}: "
                "give int64 [windows, seqlen]"
            )
        return cls(tokens.cpu(), False, text, len(tokens))

    @property
    def fingerprint(self) -> str:
        """sha256 over shape and tokens."""
        shape = repr(tuple(self.tokens.shape)).encode()
        return hashlib.sha256(shape + self.tokens.numpy().tobytes()).hexdigest()

    def draw(self, count: int, seed: int) -> Windows:
        """`count` windows drawn with `seed`, in the order of the text; `TextError` where there are fewer."""
        return dataclasses.replace(self, tokens=self.tokens[self._lot(count, seed).sort().values])

    def nested(self, sizes: Sequence[int], seed: int) -> Windows:
        """The windows that `draw` draws for the last of the rising `sizes`, the ones it draws for each size first."""
        lot = self._lot(sizes[-1], seed)
        stretches = [lot[first:size].sort().values for first, size in pairwise([0, *sizes])]
        return dataclasses.replace(self, tokens=self.tokens[torch.cat(stretches)])

    def _lot(self, count: int, seed: int) -> Tensor:
        """Which windows are drawn; a smaller count draws the first ones of a larger one's."""
        check_seed(seed)
        if count < 1:
            raise ArgumentError(f"num_samples = {count} is too small: use 1 or more")
        if count > len(self.tokens):
            raise TextError(
                f"num_samples = {count} is more than the {len(self.tokens)} sequences of {self.tokens.shape[1]} tokens "
                f"in text {self.text!r}: give more text, or lower --num-samples or --seqlen"
            )
        return torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(seed))[:count]

    def last(self, count: int) -> Windows:
        """The last `count` windows of the text, or all where there are fewer."""
        if count < 1:
            raise ArgumentError(f"max_windows = {count} is too small: use 1 or more")
        return dataclasses.replace(self, tokens=self.tokens[-count:])

    def record(self) -> dict[str, Any]:
        """The protocol as JSON values."""
        count, seqlen = self.tokens.shape
        return {
            "text": self.text,
            "windows": count,
            "windows_available": self.available,
            "characters": self.characters,
            "seqlen": seqlen,
            "tokens": count * seqlen,
            "bos": self.bos,
            "fingerprint": self.fingerprint,
        }


def contents(text: str, part: Part) -> str | Iterable[Any]:
    """What is behind a name: `builtin`, the path of a file, or a data set NAME[:CONFIG[:SPLIT]].

    A text of at most `MOST_TEXT` characters; or rows, where the file or the data set has rows.
    """
    if text == BUILTIN:
        return builtin_text(part)
    path = _path(text)
    if path is not None and path.is_file():
        return text_files.contents(path, text, MOST_TEXT)
    if is_here(text):
        what = "a folder" if path is not None and path.is_dir() else "no such file"
        raise TextError(f"text {text!r}: {what}; give a UTF-8 text file, the name of a data set, or 'builtin'")
    return _rows_of_dataset(text, part)


_SUFFIXES = {".txt", ".md", ".parquet", *text_files.JSON}
"""Of names that mean a file, there or not."""


def is_here(text: str) -> bool:
    """Whether a text is of this machine, there or not, and no data set that would have to be fetched."""
    path = _path(text)
    means_file = path is None or path.exists() or path.suffix.lower() in _SUFFIXES
    return text == BUILTIN or means_file or text.startswith(("/", ".", "~"))


def _path(text: str) -> Path | None:
    """A name as a path; None for one that no file can have."""
    try:
        path = Path(text).expanduser()
        path.is_file()
    except (OSError, RuntimeError, ValueError):
        return None
    return path


def builtin_text(part: Part) -> str:
    """The topics of CPython's language reference that belong to a part; a topic's name alone decides which."""
    from pydoc_data.topics import topics

    def held_out(topic: str) -> bool:
        return hashlib.sha256(topic.encode()).digest()[0] % 4 == 0

    return "\n\n".join(topics[name] for name in sorted(topics) if held_out(name) == (part == "evaluation"))


def windows_of_text(raw: str, text: str, tokenizer: Any, seqlen: int) -> Windows:
    """All full windows of `seqlen` tokens of a text that is called `text`, from its start; the rest is not used.

    Tokenizers that begin a text with a token of their own (BOS) have it at the start of every window, inside its
    length. `TextError` where there is not one window.
    """
    if not raw.strip():
        raise TextError(f"text {text!r} is empty: give a file with at least {seqlen} tokens")
    prefix = _prefix(tokenizer)
    body = torch.cat([torch.tensor(encode(tokenizer, part, special=False)).long() for part in _stretches(raw)])
    step = seqlen - len(prefix)
    count = body.numel() // step
    if count == 0:
        raise TextError(
            f"text {text!r} is too short: its {body.numel()} tokens do not fill one sequence of {seqlen}; "
            "give more text or lower --seqlen"
        )
    tokens = body[: count * step].view(count, step)
    if prefix:
        tokens = torch.cat([torch.tensor(prefix).expand(count, -1), tokens], dim=1)
    return Windows(tokens, bool(prefix), text, count, len(raw))


def positions(config: Any) -> int | None:
    """How many tokens a model was made to read, where its configuration says it."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((most for most in limits if isinstance(most, int) and most > 0), None)


def sequence_length(asked: int | None, usual: int, config: Any, model: str | Path, name: str = "seqlen") -> int:
    """Tokens per sequence: `asked`, `ArgumentError` if the model has fewer positions; for None the usual number, or all
    positions of a shorter model."""
    if asked is None:
        return min(usual, positions(config) or usual)
    check_seqlen(asked, config, model, name)
    return asked


def check_seqlen(seqlen: int, config: Any, model: str | Path, name: str = "seqlen") -> None:
    """`ArgumentError` for windows that are longer than what the model was trained to read."""
    most = positions(config)
    if most is not None and seqlen > most:
        raise ArgumentError(f"{name} = {seqlen} is more than the {most} positions of {model}: use {most} or less")


def _stretches(text: str) -> Iterator[str]:
    """A text whole, or one longer than `WHOLE` in parts of some `STRETCH` characters that end with a line, if lines are
    not longer than that."""
    start, step = 0, STRETCH if len(text) > WHOLE else WHOLE
    while start < len(text):
        stop = start + step
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _prefix(tokenizer: Any) -> list[int]:
    """The tokens a tokenizer puts before every text."""
    bare = encode(tokenizer, "a", special=False)
    full = encode(tokenizer, "a")
    for length in range(len(full) - len(bare) + 1):
        if full[length : length + len(bare)] == bare:
            return list(full[:length])
    return []


def _rows_of_dataset(name: str, part: Part) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"text {name!r} is no file, and reading it as a data set needs: pip install datasets"
        ) from error
    path, config, split = [*name.split(":", 2), "", ""][:3]  # a split may be a slice, train[:1000]
    split = split or ("train" if part == "calibration" else "test")
    try:
        rows: Iterable[Any] = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # of the hub's client, or of whatever reads the data set's files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TextError(f"text {name!r} is no file and did not load as a data set: {reason}") from error
    return rows


def joined(texts: Iterable[str]) -> str:
    """Texts with line ends between them, as many as there may be."""
    kept, room = [], MOST_TEXT
    for text in texts:
        kept.append(text[:room])
        room -= len(kept[-1]) + 1
        if room <= 0:
            break
    return "\n".join(kept)
