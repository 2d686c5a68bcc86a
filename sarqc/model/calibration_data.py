"""Calibration data in the forms that a caller has it in: a name, texts, conversations, rows of a data set, token ids.

"text.txt", "NAME:CONFIG:SPLIT", "builtin"          a text; see `sarqc.model.dataset`
["a text", "another"]                               texts
[[{"role": "user", "content": "..."}, ...], ...]    conversations: the model's chat template is applied
datasets.Dataset, or any iterable of rows           rows with "messages", "conversations", "text" or "input_ids"
int64 [sequences, tokens]                           token ids, used as they are
[[1, 2, 3], [4, 5, 6, 7]]                           token ids of documents, cut into sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarqc.errors import ArgumentError, ModelError, TextError, first_line
from sarqc.model.dataset import (
    GIVEN,
    GIVEN_CHATS,
    GIVEN_TEXTS,
    MOST_TEXT,
    Windows,
    is_here,
    joined,
    windows,
    windows_of_text,
)
from sarqc.model.tokenizer import encode

MOST_TOKENS = MOST_TEXT // 4
"""Token ids that are read of conversations and of rows of token ids."""
_COLUMNS = ("messages", "conversations", "text", "input_ids")
_FORMS = "texts, conversations (lists of {'role', 'content'}), rows with one of the columns " + ", ".join(_COLUMNS)


def calibration_windows(data: Any, tokenizer: Callable[[], Any], seqlen: int) -> Windows:
    """All full sequences of `seqlen` tokens of calibration data.

    Args:
        data: In one of the forms above.
        tokenizer: Returns the tokenizer; not called for token ids.
        seqlen: Tokens per sequence; a tensor of token ids has its own.

    Raises:
        ArgumentError: `data` has none of these forms.
        TextError: It is empty, or too short for one sequence.
        ModelError: The tokenizer has no chat template, or fails.
    """
    if isinstance(data, Tensor):
        return Windows.of_tokens(data)
    if isinstance(data, str | Path):
        return windows(str(data), tokenizer(), part="calibration", seqlen=seqlen)
    first, rows = _begun(data)
    found = _value(first)
    if isinstance(found, str):
        texts = (_text(_value(row)) for row in rows)
        return windows_of_text(joined(texts), GIVEN_TEXTS, tokenizer(), seqlen)
    if _is_conversation(found):
        loaded = tokenizer()
        return _cut((_chat_tokens(loaded, _value(row)) for row in rows), GIVEN_CHATS, seqlen)
    if _are_tokens(found):
        return _cut((_tokens(_value(row)) for row in rows), GIVEN, seqlen)
    raise _unknown(first)


def counts_at_once(data: Any) -> bool:
    """Whether counting the sequences of calibration data fetches nothing."""
    return not isinstance(data, str | Path) or is_here(str(data))


def _begun(data: Any) -> tuple[Any, Iterator[Any]]:
    """The first row, and all rows."""
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unknown(data)
    rows = iter(data)
    head = list(islice(rows, 1))
    if not head:
        raise TextError("dataset is empty: give at least one text, conversation or row")
    return head[0], chain(head, rows)


def _value(row: Any) -> Any:
    """What a row holds: the value of the column that is known, or the row itself."""
    if isinstance(row, Mapping):
        return next((row[name] for name in _COLUMNS if row.get(name) is not None), None)
    return row


def _is_conversation(value: Any) -> bool:
    rows = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return rows and all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in value)


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
    if not _are_tokens(value):
        raise _unknown(value)
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _chat_tokens(tokenizer: Any, chat: Any) -> list[int]:
    """The tokens of a conversation. The template writes the tokens that begin a text, so none are added."""
    if not _is_conversation(chat):
        raise _unknown(chat)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template: give texts, or a tokenizer with a template")
    try:
        text = tokenizer.apply_chat_template(list(chat), tokenize=False)
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
    keys = f" with the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
    return ArgumentError(f"dataset holds a {kind}{keys}, which is not read: use {_FORMS}, or int64 token ids")
