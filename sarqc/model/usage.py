"""What each weight of a model is used for, observed in one forward of text on the meta device.

No name decides anything here. The forward runs without data, and each operation tells where its operands come from:

- A *product* multiplies a parameter with activations. Its output carries the parameter's name and no older one.
- A *comparison* multiplies activations with activations, as attention does. Names go through it, marked as compared.
- A *choice* is a `topk`, a sort or an `argmax`: experts of a router, positions of a sparse attention.

A parameter is a *selector* when its outputs reach a choice as they are (a router), when they reach one through a
comparison and nothing else (the queries, keys and weights of an index), or when only selectors read them. Rounding a
selector changes which experts or positions a token sees, and servers keep it in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

TOKENS = 64
_FOUND = 2
"""As many positions are taken to be set in any mask."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum", "convolution", "_grouped_mm", "dot", "mv")
_ATTENTION = "_scaled_dot_product"
_CHOICES = ("topk", "sort", "argsort", "argmax", "kthvalue", "multinomial", "max.dim")
_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Usage:
    """What one forward of text does with the parameters of a model, by their full names.

    multiplied: parameters that multiply activations. called: Linear modules whose own forward was called, numbered in
    the order of their first calls. selectors: parameters whose outputs choose; see the file's first lines. touched:
    every parameter and buffer that was read.
    """

    multiplied: frozenset[str]
    called: Mapping[str, int]
    selectors: frozenset[str]
    touched: frozenset[str]
    changed: frozenset[str]


@dataclass(frozen=True)
class _Origin:
    """Where a tensor comes from. parameter: it is a view or a copy of that parameter. direct, compared: parameters
    whose outputs it is made of, without and with a comparison in between."""

    parameter: str | None = None
    direct: frozenset[str] = _NOTHING
    compared: frozenset[str] = _NOTHING


@dataclass
class _Seen:
    multiplied: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    chosen: set[str] = field(default_factory=set)
    chosen_compared: set[str] = field(default_factory=set)
    readers: dict[str, set[str]] = field(default_factory=dict)

    def selectors(self) -> frozenset[str]:
        """Parameters whose outputs choose, and those that only such ones read."""
        selectors = self.chosen | {name for name in self.chosen_compared if not self.readers.get(name)}
        selectors &= self.multiplied
        while more := {name for name, by in self.readers.items() if by <= selectors} - selectors:
            selectors |= more
        return frozenset(selectors)


def usage(model: Any) -> Usage | None:
    """Observe one forward of `TOKENS` tokens of text through a model whose parameters are on meta.

    Returns:
        What was seen; None where the model's code does not run without data.
    """
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    called: dict[str, int] = {}
    watch = _Watch(names)
    with ExitStack() as hooks:
        hooks.enter_context(_same_buffers(model))
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_pre_hook(partial(_number, called, path)))
        try:
            with torch.no_grad(), watch:
                ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
                model(input_ids=ids, use_cache=False)
        except Exception:  # noqa: BLE001  # foreign code without data fails with whatever it happens to raise
            return None
    seen = watch.seen
    changed = seen.written & {name for name, _ in model.named_parameters()}
    multiplied, touched = frozenset(seen.multiplied), frozenset(seen.touched)
    return Usage(multiplied, called, seen.selectors(), touched, frozenset(changed))


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """The buffers stay those that they are: some models keep a table where their inputs are, which is meta here."""
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for buffers, own in kept:
            buffers.update(own)


def _number(called: dict[str, int], path: str, *_: object) -> None:
    called.setdefault(path, len(called))


class _Watch(TorchDispatchMode):
    """Notes the origin of each tensor, and answers questions about data that meta tensors do not have."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it
        self.names = names
        self.seen = _Seen()
        self._origins = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        origins = [self._origin(tensor) for tensor in operands]
        if any(tensor.is_meta for tensor in operands):
            answer = _without_data(func, args, kwargs)
            if answer is not None:
                return answer
            args, kwargs = tree_map_only(Tensor, _to_meta, (_without_masks(func, args), kwargs))
        out = func(*args, **kwargs)
        if operands:
            self._note(func, operands, origins, out)
        return out

    def _origin(self, tensor: Tensor) -> _Origin:
        if (name := self.names.get(id(tensor))) is not None:
            self.seen.touched.add(name)
            return _Origin(parameter=name)
        origin: _Origin = self._origins.get(tensor, _Origin())
        return origin

    def _note(self, func: Any, operands: list[Tensor], origins: list[_Origin], out: Any) -> None:
        name = func.overloadpacket.__name__.removesuffix("_")
        direct = frozenset().union(*(origin.direct for origin in origins))
        compared = frozenset().union(*(origin.compared for origin in origins))
        if name in _CHOICES or f"{name}.{func._overloadname}" in _CHOICES:
            self.seen.chosen |= direct
            self.seen.chosen_compared |= compared
        product = name in _PRODUCTS or name.startswith(_ATTENTION)
        weights = [o.parameter for t, o in zip(operands, origins) if o.parameter is not None and t.dim() > 1]
        if product and weights and len(weights) < len(operands):
            self.seen.multiplied.update(weights)
            for parameter in direct | compared:
                self.seen.readers.setdefault(parameter, set()).update(weights)
            made = _Origin(direct=frozenset(weights))
        elif product:
            made = _Origin(compared=direct | compared)
        elif all(origin.parameter is not None for origin in origins):
            made = _Origin(parameter=max(zip(operands, origins), key=lambda one: one[0].dim())[1].parameter)
        else:
            made = _Origin(direct=direct, compared=compared)
        written = [value for value, argument in zip(operands, func._schema.arguments) if argument.is_write]
        self.seen.written.update(self.names[id(value)] for value in written if id(value) in self.names)
        for tensor in (*tree_iter(out), *written):
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or made.parameter):
                self._origins[tensor] = made
                if tensor in written and (base := tensor._base) is not None:
                    self._origins[base] = _both(self._origin(base), made)


def _both(one: _Origin, other: _Origin) -> _Origin:
    return _Origin(None, one.direct | other.direct, one.compared | other.compared)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _without_data(func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    """An answer of the right kind where an operation asks for the numbers in a tensor; None for any other."""
    name: str = func.overloadpacket.__name__
    first: Any = next(iter(args), None)
    if name == "_local_scalar_dense":
        return False if first.dtype == torch.bool else torch.ones((), dtype=first.dtype).item()
    if name == "equal":
        return True
    if name == "_to_copy" and kwargs.get("device") == torch.device("cpu"):  # .cpu(), .tolist()
        return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
    if name == "nonzero":
        return torch.empty(_FOUND, first.dim(), dtype=torch.int64, device="meta")
    return None


def _without_masks(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an indexing operation with positions in the place of masks, whose count nobody knows."""
    if not func.overloadpacket.__name__.startswith("index") or len(args) < 2 or not isinstance(args[1], list | tuple):
        return args
    positions: list[Any] = []
    for index in args[1]:
        mask = isinstance(index, Tensor) and index.dtype == torch.bool
        indices = torch.empty(_FOUND, dtype=torch.int64, device="meta")
        positions += [indices] * index.dim() if mask else [index]
    return (args[0], positions, *args[2:])
