"""Tensors on their way between ranks: many small ones in one message, as bytes, which all dtypes are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MESSAGE_BYTES = 1 << 24
"""Most bytes that are copied into one message. To send a message takes as long as a megabyte of it."""


class Message:
    """Tensors side by side. content: their bytes, uint8 [n], in `buffer` once they are packed; the bytes themselves of
    a single tensor that lies in one piece."""

    def __init__(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        self._copied: list[tuple[Tensor, Tensor]] = []
        first, *others = tensors
        if not others and first.is_contiguous():
            self.content = first.view(-1).view(torch.uint8)
            return
        taken = 0
        for tensor in tensors:
            place = buffer[taken : taken + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._copied.append((tensor, place))
            taken += tensor.nbytes
        self.content = buffer[:taken]

    def pack(self) -> None:
        """Copy the tensors into the content. A receiver does not need it."""
        for tensor, place in self._copied:
            place.copy_(tensor)

    def unpack(self) -> None:
        """Copy the content into the tensors."""
        for tensor, place in self._copied:
            tensor.copy_(place)


def messages(tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[Message]:
    """All elements of the tensors, in few messages. Each is packed and sent, or received and unpacked, before the next.

    The only memory that it takes is `buffer`, uint8 [`MESSAGE_BYTES`]: ranks that are in the middle of a sum cannot run
    out of it. Messages are the same on every rank, whichever tensors lie in one piece there.
    """
    waiting: list[Tensor] = []
    room = len(buffer)
    for tensor in sorted(tensors, key=lambda tensor: -tensor.itemsize):  # so that each begins where its dtype may
        for piece in _pieces(tensor, len(buffer)):
            if waiting and piece.nbytes > room:
                yield Message(waiting, buffer)
                waiting, room = [], len(buffer)
            waiting.append(piece)
            room -= piece.nbytes
    if waiting:
        yield Message(waiting, buffer)


def _pieces(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """Views of all elements of a tensor, each of at most `most` bytes."""
    if tensor.nbytes > most:
        for half in tensor.chunk(2, dim=max(range(tensor.dim()), key=tensor.size)):
            yield from _pieces(half, most)
    elif tensor.numel():
        yield tensor
