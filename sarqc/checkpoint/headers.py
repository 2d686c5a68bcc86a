"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors without gaps.

    {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

The safetensors library judges every header (overlaps, holes, overflow, lengths). What it accepts is then read here
once more for the offsets, because tensors are not taken from its memory map: pages of a map count as memory of the
process, so that reading a model through one would look like, and under a memory limit be, having it all in memory;
and a file that shrinks under a map ends the process with a bus error instead of a message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarqc.checkpoint.files import parse_json
from sarqc.conventions import DTYPES
from sarqc.errors import CheckpointError

HEADER_LIMIT = 100_000_000
"""Bytes of header at most; the library's own cap."""


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype and shape, and where in the file its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """What the safetensors file `path` holds, in the order of the header; `CheckpointError` if it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > HEADER_LIMIT or 8 + length > size:
                raise CheckpointError(_damage(path, size, len(prefix), length))
            text = file.read(length)
        with safe_open(path, framework="pt"):
            pass  # opening is the check
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = "".join(letter for letter in str(error) if letter.isprintable())  # it quotes names from the file
        reason = reason.removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path} is damaged or truncated ({reason}): fetch the file again") from error
    header = parse_json(text, f"the header of {path}")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}


def _damage(path: Path, size: int, prefix: int, length: int) -> str:
    """Why a file is refused before its header is read."""
    if not size:
        return f"{path} is empty: fetch the file again"
    if prefix < 8:
        return f"{path} is truncated: it has {size} bytes, less than the 8 that say the header's length"
    if length > HEADER_LIMIT:
        return f"{path} claims a header of {length} bytes, more than the {HEADER_LIMIT} allowed: it is damaged"
    return f"{path} is truncated: it has {size} bytes, its header alone takes {8 + length}: fetch the file again"


def _entry(path: Path, name: str, fields: object, base: int) -> Entry:
    if not isinstance(fields, dict):  # the library also takes a list of the three values
        raise CheckpointError(f"{path} is damaged: its header describes tensor {name!r} by no JSON object")
    if (dtype := fields["dtype"]) not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype}, which is not read; {', '.join(DTYPES)} are")
    return Entry(DTYPES[dtype], tuple(fields["shape"]), base + fields["data_offsets"][0])


def dtype_name(dtype: torch.dtype) -> str:
    """The header's name for `dtype`, which must be one that a safetensors file holds."""
    return _NAMES[dtype]


def make_header(tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[str]]:
    """Length prefix and header of a file with `tensors`, and the order in which their bytes follow it.

    The order is the library's: wide dtypes first, so that every tensor is aligned to its element, then by name. The
    bytes do not depend on the order in which the tensors arrived. `begin` of the entries is not used.
    """
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for name in order:
        entry = tensors[name]
        end = begin + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    return len(text).to_bytes(8, "little") + text, order


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements of `tensor`, of any device and strides, in row-major order as bytes: what a file holds of it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
