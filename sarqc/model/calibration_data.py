"""Calibration and evaluation data in the forms that a caller has it in, as sequences of tokens.

"text.txt", "NAME:CONFIG:SPLIT", "builtin"          a text or rows; see `sarqc.model.dataset`
["a text", "another"]                               texts
[[{"role": "user", "content": "..."}, ...], ...]    conversations: the model's chat template is applied
datasets.Dataset, or any iterable of rows           rows with "messages", "conversations", "text" or "input_ids"
int64 [sequences, tokens]                           token ids, used as they are
[[1, 2, 3], [4, 5, 6, 7]]                           token ids of documents, cut into sequences

Turns of a conversation may also be {"from", "value"} (ShareGPT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarqc.config import MIN_SEQLEN
from sarqc.errors import ArgumentError, ModelError, TextError, first_line
from sarqc.model.dataset import (
    GIVEN,
    GIVEN_CHATS,
    GIVEN_TEXTS,
    MOST_TEXT,
    Part,
    Windows,
    contents,
    is_here,
    joined,
    windows_of_text,
)
from sarqc.model.tokenizer import encode

MOST_TOKENS = MOST_TEXT // 4
"""Token ids that are read of conversations and of rows of token ids."""
_COLUMNS = ("messages", "conversations", "text", "input_ids")
_FORMS = "texts, conversations (lists of {'role', 'content'}), rows with one of the columns " + ", ".join(_COLUMNS)
_ROLES = {"human": "user", "gpt": "assistant"}
"""Of ShareGPT, where they are called otherwise than in a chat template."""


def windows(
    data: Any, tokenizer: Callable[[], Any], seqlen: int, *, part: Part = "calibration", column: str | None = None
) -> Windows:
    """All full sequences of `seqlen` tokens of calibration or evaluation data.

    Args:
        data: In one of the forms above.
        tokenizer: Returns the tokenizer; not called for token ids.
        seqlen: Tokens per sequence; a tensor of token ids has its own.
        part: Which topics of `builtin`, and which split of a data set.
        column: The column of rows that is read, where it has another name than those above.

    Raises:
        ArgumentError: `data` has none of these forms.
        TextError: It is empty, or too short for one sequence.
        ModelError: The tokenizer has no chat template, or fails.
    """
    if isinstance(data, Tensor):
        return Windows.of_tokens(data)
    if seqlen < MIN_SEQLEN:
        raise ArgumentError(f"seqlen = {seqlen} is too small: use {MIN_SEQLEN} or more")
    name = None
    if isinstance(data, str | Path):
        name, data = str(data), contents(str(data), part)
        if isinstance(data, str):
            return windows_of_text(data, name, tokenizer(), seqlen)
    first, values = _begun(data, column)
    if isinstance(first, str):
        return windows_of_text(joined(map(_text, values)), name or GIVEN_TEXTS, tokenizer(), seqlen)
    if _is_conversation(first):
        loaded = tokenizer()
        return _cut((_chat_tokens(loaded, value) for value in values), name or GIVEN_CHATS, seqlen)
    assert _are_tokens(first)
    return _cut(map(_tokens, values), name or GIVEN, seqlen)


def read_text(name: str, part: Part) -> str:
    """The text behind a name, or the texts of its rows; `ArgumentError` for rows without."""
    content = contents(name, part)
    return content if isinstance(content, str) else joined(map(_text, _begun(content, None)[1]))


def counts_at_once(data: Any) -> bool:
    """Whether counting the sequences of calibration data fetches nothing."""
    return not isinstance(data, str | Path) or is_here(str(data))


def _begun(data: Any, column: str | None) -> tuple[Any, Iterator[Any]]:
    """The first value that is there, and all values; of a form that is read."""
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unknown(data)
    rows = iter(data)
    for before, row in enumerate(rows):
        value = _value(row, column)
        if value is not None:
            if isinstance(value, str) or _is_conversation(value) or _are_tokens(value):
                return value, chain([None] * before, [value], (_value(row, column) for row in rows))
            raise _unknown(row)
        if not isinstance(row, Mapping) or not any(name in row for name in (column, *_COLUMNS)):
            raise _unknown(row)
    raise TextError("dataset is empty: give at least one text, conversation or row")


def _value(row: Any, column: str | None) -> Any:
    """What a row holds: the value of the column that is asked for or known, or the row itself."""
    if not isinstance(row, Mapping):
        return row
    if column is not None and column not in row:
        raise ArgumentError(f"column = {column!r} is not in the data: use one of {', '.join(map(str, row))}")
    return next((row[name] for name in ((column,) if column else _COLUMNS) if row.get(name) is not None), None)


def _is_conversation(value: Any) -> bool:
    rows = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return rows and all(isinstance(turn, Mapping) and any(map(turn.keys().__ge__, _TURNS)) for turn in value)


_TURNS = ({"role", "content"}, {"from", "value"})


def _turn(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn as chat templates read it."""
    if "role" in turn:
        return turn
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


def _are_tokens(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and not value.is_floating_point()
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _unknown(value)
    return value


def _tokens(value: Any) -> list[int]:
    if value is None:
        return []
    if not _are_tokens(value):
        raise _unknown(value)
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _chat_tokens(tokenizer: Any, chat: Any) -> list[int]:
    """The tokens of a conversation. The template writes the tokens that begin a text, so none are added."""
    if chat is None:
        return []
    if not _is_conversation(chat):
        raise _unknown(chat)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template: give texts, or a tokenizer with a template")
    turns = list(map(_turn, chat))
    parts = (part for turn in turns if isinstance(turn["content"], list) for part in turn["content"])
    kinds = (part.get("type", "text") for part in parts if isinstance(part, Mapping))
    if other := next((kind for kind in kinds if kind != "text"), None):
        raise ArgumentError(
            f"dataset holds a conversation with a part of type {str(other)[:40]!r}; calibration reads text: "
            "keep the parts of type 'text' only"
        )
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a program: it raises what it likes
        raise ModelError(f"the chat template does not take the conversation: {first_line(error)}") from error
    return encode(tokenizer, str(text), special=False)


def _cut(documents: Iterable[Sequence[int]], name: str, seqlen: int) -> Windows:
    """Documents one behind the other, cut into sequences."""
    stream: list[int] = []
    for document in documents:
        stream += document
        if len(stream) >= MOST_TOKENS:
            break
    count = min(len(stream), MOST_TOKENS) // seqlen
    if count == 0:
        raise TextError(
            f"dataset is too short: its {len(stream)} tokens do not fill one sequence of {seqlen}; "
            "give more, or lower seqlen"
        )
    tokens = torch.tensor(stream[: count * seqlen], dtype=torch.int64).view(count, seqlen)
    return Windows(tokens, False, name, count)


def _unknown(value: Any) -> ArgumentError:
    kind = type(value).__name__
    if not isinstance(value, Mapping):
        return ArgumentError(f"dataset holds a {kind}, which is not read: use {_FORMS}, or int64 token ids")
    texts = [str(name) for name, held in value.items() if isinstance(held, str | list)]
    way = f"name the column to read, --column {max(texts, key=lambda one: len(value[one]))}, or " if texts else ""
    return ArgumentError(
        f"dataset holds a {kind} with the keys {', '.join(map(str, value))}, which is not read: {way}use {_FORMS}"
    )
