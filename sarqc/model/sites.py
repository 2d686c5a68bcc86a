"""Sites: layers that read the same tensor, so that one Gram serves them all.

Which layers those are is seen, not looked up: in one short forward of the block, Linears that received the very
same tensor object (q, k and v; gate and up) are one site. The two projections of an experts module are a site each.
Hooks on the model last only as long as the context that they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight
from sarqc.model import moe
from sarqc.model.candidates import Target
from sarqc.model.layers import pattern_of
from sarqc.model.lazy_model import LazyModel


@dataclass(frozen=True)
class ResidualWrite:
    """Where the outputs of a layer have been added to the residual stream. reader: the module that reads the sum; None
    at the end of the block.
    """

    reader: str | None


@dataclass(frozen=True)
class Site:
    """Layers with one input tensor. name: of its first member. in_features: K. experts: E, 1 for Linears.
    residual_write: where its outputs correct the residual error, if they do. entry: where its input is seen first: a
    Linear's full name, or an experts module's with the projection; "" where nothing was run.
    """

    name: str
    members: tuple[Target, ...]
    experts: int
    in_features: int
    residual_write: ResidualWrite | None = None
    entry: str = ""

    @property
    def rows(self) -> int:
        """N: rows of the weight."""
        return sum(rows for _, _, rows in self.row_ranges)

    @property
    def cross_rows(self) -> int:
        """N where the site corrects the residual error, else 0."""
        return self.rows if self.residual_write else 0

    @property
    def row_ranges(self) -> tuple[tuple[str, int, int], ...]:
        """(parameter, first row, rows) of what is concatenated to the site's weight, in order, each once."""
        return tuple(dict.fromkeys((target.parameter, target.start, target.shape[0]) for target in self.members))

    def weight(self, model: Any, first: int, stop: int) -> Tensor:
        """Weights fp32 [stop - first, N, K] of experts first .. stop, rows of all members concatenated."""
        rows = [stack(model, name)[first:stop, start : start + out] for name, start, out in self.row_ranges]
        return torch.cat(rows, 1).float()

    def split(self, weight: QuantizedWeight, first: int) -> Iterator[tuple[Target, QuantizedWeight]]:
        """Each member of the quantized weight of experts `first` and on, E = 1; those of other experts are left out."""
        parts = dict(zip(self.row_ranges, weight.split([rows for _, _, rows in self.row_ranges])))
        for target in self.members:
            if first <= target.expert < first + weight.codes.shape[0]:
                part = parts[target.parameter, target.start, target.shape[0]]
                yield target, part.expert(target.expert - first)


@dataclass(frozen=True)
class SiteChunk:
    """Experts first .. stop of a site: as much as fits into the byte budget at once."""

    site: Site
    first: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether these are all experts of the site."""
        return self.stop - self.first == self.site.experts

    @property
    def name(self) -> str:
        """The site's name, with the experts where they are not all."""
        return self.site.name if self.whole else f"{self.site.name}[{self.first}:{self.stop}]"

    def weight(self, model: Any) -> Tensor:
        """As `Site.weight`, of the chunk's experts."""
        return self.site.weight(model, self.first, self.stop)


def write_back(model: Any, target: Target, weight: QuantizedWeight) -> None:
    """Put a target's dequantized weight in the place of its own."""
    rows = stack(model, target.parameter)[target.expert, target.start : target.start + target.shape[0]]
    rows.copy_(weight.to(rows.device).dequantize(rows.dtype)[0])  # codes move: a byte each


def separate_sites(lazy: LazyModel, block_targets: Sequence[Target]) -> list[Site]:
    """Every parameter a site of its own: for methods that do not look at inputs, and need no forward."""
    return _sites(lazy, block_targets, {})


@torch.no_grad()
def find_sites(lazy: LazyModel, block_targets: Sequence[Target], run: Callable[[], object]) -> list[Site]:
    """The sites of a loaded block, seen in one run of it, in the order in which it first calls them.

    block_targets: the block's targets. run: the block on a few tokens. Raises `ModelError` naming a targeted Linear
    that this run does not call.
    """
    inputs: dict[str, list[Tensor]] = {}  # the tensors are kept, or their identities would be used again
    order: dict[str, None] = {}

    def called(name: str, x: Tensor) -> None:
        order.setdefault(f"{name}.weight")
        inputs[name].append(x)

    def projected(name: str, projection: str, x: Tensor, offsets: Tensor) -> None:
        order.setdefault(f"{name}.{projection}")

    with ExitStack() as hooks:
        for name in dict.fromkeys(target.module for target in block_targets):
            module = lazy.model.get_submodule(name)
            if moe.is_experts(module):
                hooks.enter_context(moe.observed(module, partial(projected, name)))
            else:
                inputs[name] = []
                hooks.enter_context(observing_input(module, partial(called, name)))
        run()
    if silent := [target for target in block_targets if target.parameter not in order]:
        raise ModelError(
            f"{silent[0].linear} is never called in its block's forward, so its inputs cannot be seen: "
            f"leave it and its like with --ignore '{pattern_of(silent)}'"
        )
    sites = _sites(lazy, block_targets, {name: tuple(map(id, seen)) for name, seen in inputs.items()})
    at = {parameter: number for number, parameter in enumerate(order)}
    seen_at = [min((target.parameter for target in site.members), key=at.__getitem__) for site in sites]
    ordered = sorted(zip(seen_at, sites), key=lambda pair: at[pair[0]])
    return [replace(site, entry=parameter.removesuffix(".weight")) for parameter, site in ordered]


def observe(lazy: LazyModel, site: Site, seen: Callable[[Tensor], object]) -> AbstractContextManager[object]:
    """Hand the rows [T, K] that a site reads to `seen`, for the time of the context."""
    first = site.members[0]
    module, leaf = lazy.model.get_submodule(first.module), first.parameter.rpartition(".")[2]
    if moe.is_experts(module):

        def pass_on(projection: str, x: Tensor, _: Tensor) -> None:
            if projection == leaf:
                seen(x)

        return moe.observed(module, pass_on)
    return observing_input(module, lambda x: seen(x.reshape(-1, site.in_features)))


def observing_input(module: nn.Module, seen: Callable[[Tensor], object]) -> RemovableHandle:
    """Hand the first tensor that a module is called with, if there is one, to `seen`, for the time of the context."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is not None:
            seen(first)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _sites(lazy: LazyModel, block_targets: Sequence[Target], inputs: dict[str, tuple[int, ...]]) -> list[Site]:
    """Group targets by what their module read, or by their parameter where that is not known."""
    groups: dict[object, list[Target]] = {}
    for target in block_targets:
        groups.setdefault(inputs.get(target.module, target.parameter), []).append(target)
    return [
        Site(
            name=members[0].linear,
            members=tuple(members),
            experts=len(stack(lazy.model, members[0].parameter)),
            in_features=members[0].shape[1],
        )
        for members in groups.values()
    ]


def stack(model: Any, parameter: str) -> Tensor:
    """A parameter as matrices [E, rows, K]; a Linear's is a stack of one."""
    tensor: Tensor = model.get_parameter(parameter).detach()
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
