"""Tensors of a suspended micro-batch, moved out of memory while it waits and back before it goes on.

What a suspended forward holds are locals and temporaries of the model's code, which nobody can list. So every storage
that an operation of the micro-batch makes is noted, weakly; those that are still alive when it suspends are what it
holds. Their bytes are moved to a `Store` and the storages are resized to 0; the tensors stay the same objects, and are
as they were once the storages are filled again. Weights and whatever else existed before are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sarqc.pipeline.activation_store import Store, Ticket

LEAST_BYTES = 1 << 14
"""Smaller storages stay: rotary tables of a window, router scores, counts."""


class Offload(TorchDispatchMode):
    """What one micro-batch has made, as a mode that is on while it runs.

    owners: of offloaded storages, shared by all micro-batches. A tensor that one of them has made and another one uses
    (a table that the model keeps) is filled again and stays from then on.
    """

    def __init__(self, store: Store, owners: dict[int, Offload], least_bytes: int = LEAST_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it
        self._store = store
        self._owners = owners
        self._least = least_bytes
        self._made: dict[int, StorageWeakRef] = {}
        self._offloaded: dict[int, tuple[UntypedStorage, int, Ticket]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if _counts(tensor)}
        for key in known & self._owners.keys():
            self._owners[key].share(key)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if _counts(tensor) and (key := _key(tensor)) not in known:
                self._made[key] = StorageWeakRef(tensor.untyped_storage())
        return out

    def alive(self) -> dict[int, UntypedStorage]:
        """Storages of `least` bytes or more that the micro-batch made and that are alive, by their address."""
        self._made = {key: ref for key, ref in self._made.items() if not ref.expired()}
        storages = {key: UntypedStorage._new_with_weak_ptr(ref.cdata) for key, ref in self._made.items()}
        return {
            key: storage for key, storage in storages.items() if storage is not None and storage.nbytes() >= self._least
        }

    def offload(self) -> None:
        """Move what the micro-batch holds to the store."""
        for key, storage in self.alive().items():
            if storage.resizable():
                size = storage.nbytes()
                self._offloaded[key] = storage, size, self._store.put(storage)
                self._owners[key] = self
                storage.resize_(0)

    def restore(self) -> None:
        """Fill all storages again."""
        for key in list(self._offloaded):
            self._fill(key)

    def share(self, key: int) -> None:
        """Fill a storage that another micro-batch uses as well, and leave it alone from now on."""
        self._fill(key)
        del self._made[key]

    def discard(self) -> None:
        """Forget what is offloaded: the micro-batch has ended."""
        for key, (_, _, ticket) in self._offloaded.items():
            self._store.drop(ticket)
            del self._owners[key]
        self._offloaded.clear()
        self._made.clear()

    def _fill(self, key: int) -> None:
        storage, size, ticket = self._offloaded.pop(key)
        del self._owners[key]
        storage.resize_(size)
        self._store.take(ticket, storage)


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
