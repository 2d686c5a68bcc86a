"""Where a forward suspends, and the hooks that make it do so.

A point is reached by a task (`pipeline.task`) that runs the model; whoever else calls the same modules passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from greenlet import getcurrent
from torch import Tensor, nn

from sarqc.contexts import Closing
from sarqc.errors import ModelError
from sarqc.model import moe
from sarqc.pipeline.task import Task

Kind = Literal["enter", "site", "reader", "leave", "end"]


@dataclass(frozen=True)
class Point:
    """A place in a model's forward. block: index of the decoder block, the number of blocks behind the last one.

    kind: "enter" and "leave" are the block's own; "site" is where a Linear, or a projection of an experts module, is
    handed its input; "reader" is where a module is handed the residual stream; "end" is where the forward has ended.
    name: full name of the module, with the projection for experts (`Site.entry`).
    """

    kind: Kind
    block: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name} in block {self.block}" if self.name else f"{self.kind} of block {self.block}"


@dataclass
class Arrival:
    """What a micro-batch brought to a point.

    tensor: what enters or leaves the block, or the input of the module; None where there is no tensor. offsets: int64
    [E + 1] of rows sorted by expert, where the site is a projection of experts. args, kwargs: of the block that is
    entered. output: of the block that is left, or of the whole forward. skipped: text does not pass through the block,
    and the tensor is what has left the one before.
    """

    point: Point
    tensor: Tensor | None = None
    offsets: Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    skipped: bool = False

    @property
    def x(self) -> Tensor:
        """The tensor; `ModelError` naming the module that received none."""
        if self.tensor is None:
            raise ModelError(f"{self.point} is called without a tensor, so its inputs cannot be seen")
        return self.tensor


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in what a module takes or returns: itself, or in a tuple, list or mapping."""
    if isinstance(values, Tensor):
        return values
    inside = values.values() if isinstance(values, dict) else values if isinstance(values, tuple | list) else ()
    return next((value for value in inside if isinstance(value, Tensor)), None)


def order_of(points: Iterable[Point], run: Callable[[], object]) -> list[Point]:
    """Points in the order in which a run reaches them; hooks have to be there."""
    wanted, order = set(points), []
    task = Task(run, 0, wanted.__contains__)
    while not task.ended:
        arrival = task.resume()
        if isinstance(arrival, Arrival):
            order.append(arrival.point)
    return order


class Hooks(Closing):
    """Hooks on every block of a model, and on chosen modules in them. A context: all are gone when it ends."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = ExitStack()
        self._inside = ExitStack()
        for index, block in enumerate(blocks):
            enter, leave = Point("enter", index), Point("leave", index)
            self._blocks.callback(block.register_forward_pre_hook(partial(_enter, enter), with_kwargs=True).remove)
            self._blocks.callback(block.register_forward_hook(partial(_leave, leave)).remove)

    def watch(self, points: Iterable[Point], model: Any, router_weight_power: int = 0) -> None:
        """Suspend at these sites and readers too, instead of those watched so far.

        router_weight_power: rows of experts come scaled by their router weight, see `moe.observed`.
        """
        self._inside.close()
        by_module: dict[str, dict[str, Point]] = {}
        for point in points:
            parent, _, leaf = point.name.rpartition(".")
            module = model.get_submodule(parent)
            if point.kind == "site" and moe.is_experts(module) and leaf in moe.projections(module):
                by_module.setdefault(parent, {})[leaf] = point
            elif point.kind in ("site", "reader"):
                hook = partial(_read, point)
                handle = model.get_submodule(point.name).register_forward_pre_hook(hook, with_kwargs=True)
                self._inside.callback(handle.remove)
        for name, projections in by_module.items():
            observer = partial(_project, projections)
            self._inside.enter_context(moe.observed(model.get_submodule(name), observer, router_weight_power))

    def close(self) -> None:
        """Remove every hook."""
        self._inside.close()
        self._blocks.close()


def _enter(point: Point, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    task = getcurrent()
    if isinstance(task, Task):
        tensor = first_tensor(args) if first_tensor(args) is not None else first_tensor(kwargs)
        task.reach(point, Arrival(point, tensor, args=args, kwargs=kwargs))


def _leave(point: Point, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    task = getcurrent()
    if isinstance(task, Task):
        task.reach(point, Arrival(point, first_tensor(output), output=output))


def _read(point: Point, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    task = getcurrent()
    if isinstance(task, Task):
        tensor = first_tensor(args) if first_tensor(args) is not None else first_tensor(kwargs)
        task.reach(point, Arrival(point, tensor))


def _project(points: dict[str, Point], projection: str, x: Tensor, offsets: Tensor) -> None:
    task = getcurrent()
    if isinstance(task, Task) and projection in points:
        point = points[projection]
        task.reach(point, Arrival(point, x, offsets))
