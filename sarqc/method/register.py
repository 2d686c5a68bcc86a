"""Methods with a solver of one's own."""

from __future__ import annotations

from typing import Any

from sarqc.config import METHODS, MethodConfig
from sarqc.errors import ArgumentError
from sarqc.method.layer import SOLVERS, Solver
from sarqc.methods import Method

_BUILT_IN = frozenset(METHODS)


def register_solver(
    name: str,
    solver: Solver,
    *,
    about: str = "a registered solver",
    channel_scales: bool = False,
    **own: Any,
) -> None:
    """Add a method that uses this solver: `sarqc.quantize(model, out, method=name)`.

    A name that was registered before is replaced.

    Args:
        name: Name of the method, and of the solver.
        solver: Quantizes one weight [E, N, K], as `sarqc.Solver` says. It gets one layer, or all experts of a layer.
        about: What the method is, in a line.
        channel_scales: Whether channel scales are searched first, as AWQ does.
        **own: The method's own values of options of `MethodConfig`, where they are not the usual ones.

    Raises:
        ArgumentError: A built-in name, a solver that cannot be called, or a value that an option does not take.
    """
    if not isinstance(name, str) or not name or name in _BUILT_IN:
        raise ArgumentError(f"name = {name!r} is taken by a built-in method or is no name: use another")
    if not callable(solver):
        raise ArgumentError(f"solver = {solver!r} cannot be called: give a function, as sarqc.Solver says")
    before = METHODS.get(name)
    METHODS[name] = Method(name, about, channel_scales=channel_scales)
    try:
        MethodConfig(name, **own)
    except (ArgumentError, TypeError) as error:
        METHODS.pop(name)
        if before is not None:
            METHODS[name] = before
        raise ArgumentError(f"{name}: {error}") from error
    METHODS[name] = Method(name, about, channel_scales=channel_scales, own=own)
    SOLVERS[name] = solver
