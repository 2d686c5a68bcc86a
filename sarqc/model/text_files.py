"""Files of calibration and evaluation data, known by what they hold and not by their names.

Plain text in UTF-8, or in UTF-16 with its mark; JSON Lines and JSON lists; each of these also in gzip, bzip2 or xz; and
Parquet. What is none of them is refused, because a tokenizer makes tokens of any bytes.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sarqc.errors import TextError, first_line

JSON_LINES = frozenset({".jsonl", ".ndjson"})
JSON = frozenset({".json", *JSON_LINES})
_PARQUET, _ZSTD = b"PAR1", b"\x28\xb5\x2f\xfd"
_BATCH = 256
"""Rows of a Parquet file that are read at a time."""


def contents(path: Path, name: str, most: int) -> str | Iterator[Any]:
    """The text of a file, or its rows, where it has rows: JSON objects, lists or texts.

    name: what errors call the file. most: characters that are read; rows beyond them are left out. `TextError` for a
    file that cannot be read or holds neither.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic.startswith(_PARQUET):
            return _parquet(path, name)
        if magic.startswith(_ZSTD):
            raise TextError(f"text {name!r} is compressed with zstd, which is not read: unpack it first, `zstd -d`")
        with _opened(path, magic) as raw:
            text, whole = _decoded(raw, name, most)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise TextError(f"text {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix.lower() in {".csv", ".tsv"}:
        raise TextError(f"text {name!r} is a table: convert it to JSON Lines, Parquet or plain text")
    suffixes = {suffix.lower() for suffix in path.suffixes}
    rows = _rows(text, name, bool(JSON_LINES & suffixes), whole)
    named = bool(JSON & suffixes)
    if rows is None and not whole and re.match(r"\s*\[" if named else r"\s*\[\s*\{", text):
        raise TextError(
            f"text {name!r} is a JSON list of more than {most} characters, which cannot be read in part: make it JSON "
            "Lines, `jq -c '.[]'`"
        )
    if rows is None and named:
        raise TextError(f"text {name!r} is no list of rows: give JSON Lines, a JSON list, or plain text in a .txt file")
    return text if rows is None else rows


def _opened(path: Path, magic: bytes) -> Any:
    """The unpacked bytes of a file that begins with `magic`."""
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if magic.startswith(b"BZh"):
        return bz2.open(path, "rb")
    return lzma.open(path, "rb") if magic.startswith(b"\xfd7zXZ") else path.open("rb")


def _decoded(raw: Any, name: str, most: int) -> tuple[str, bool]:
    """The first `most` characters, line ends as they are in Python, and whether these are all."""
    start = raw.read(2)
    raw.seek(0)
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        file = io.TextIOWrapper(raw, encoding=encoding)
        text, whole = file.read(most), not file.read(1)
    except UnicodeDecodeError as error:
        if b"\0" in error.object:
            raise TextError(f"text {name!r} is a binary file: give text, JSON Lines or Parquet") from error
        raise TextError(
            f"text {name!r} is not {encoding.removesuffix('-sig').upper()} ({error.reason}): convert it first, "
            "`iconv -f LATIN1 -t UTF-8` for one"
        ) from error
    if "\0" in text:
        raise TextError(f"text {name!r} is a binary file (character {text.index(chr(0))} is NUL): give text")
    return text, whole


def _rows(text: str, name: str, json_lines: bool, whole: bool) -> Iterator[Any] | None:
    """The rows of JSON Lines or of a JSON list; None for what is neither.

    json_lines: whether the file is called so. Otherwise the first two lines that are not blank decide.
    """
    start = text.lstrip()[:1]
    if json_lines or (start == "{" and _begins_with_objects(text)):
        return _json_lines(text, name, whole)
    if start != "[":
        return None
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return iter(rows) if isinstance(rows, list) and all(isinstance(row, dict | str | list) for row in rows) else None


def _begins_with_objects(text: str) -> bool:
    first = [line for line, _ in zip((line for line in io.StringIO(text) if line.strip()), range(2))]
    try:
        return all(isinstance(json.loads(line), dict) for line in first)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str, name: str, whole: bool) -> Iterator[Any]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip() and (whole or line.endswith("\n")):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(f"text {name!r}: line {number} is not JSON ({first_line(error)}): repair it") from error


def _parquet(path: Path, name: str) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TextError(f"text {name!r} is a Parquet file, and reading it needs: pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(_BATCH):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise TextError(f"text {name!r} is a Parquet file that cannot be read: {first_line(error)}") from error
