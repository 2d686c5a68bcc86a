"""Which implementation of an operation runs, and why.

An operation lists its implementations, fastest first: cuda, triton, cpu, reference. Each can say why it cannot take a
call. `pick` returns the first that can; `explain` returns every verdict. A caller (`backend=`) or the environment
variable SARQC_BACKEND, read at every call, may name one: then that one runs or `BackendError` says why it cannot.
Nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sarqc_kernels.errors import ArgumentError, BackendError

__all__ = ["BACKENDS", "ENVIRONMENT", "Implementation", "explain", "pick", "takes_all"]

BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT = "SARQC_BACKEND"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    name: one of `BACKENDS`. unsupported: called with the operation's arguments, returns None when `run` can take them
    and otherwise the reason; it must be cheap and must not wait for a device. run: the computation; it imports what it
    needs (triton, a compiled extension) when first called.
    """

    name: str
    unsupported: Callable[..., str | None]
    run: Callable[..., Any]


def takes_all(*_: object) -> str | None:
    """The `unsupported` of an implementation that takes every call inside the contract: a reference."""
    return None


def pick(
    op: str, implementations: Sequence[Implementation], args: Sequence[Any], backend: str | None = None
) -> Implementation:
    """The implementation of `op` that takes a call with `args`.

    implementations: fastest first. backend: a name from `BACKENDS`, or None for the environment's choice, and without
    one for the first that can. Raises ArgumentError for an unknown name, BackendError with the reason where the one
    asked for cannot take the call or none can.
    """
    wanted, said_by = (backend, "backend") if backend else (_from_environment(), ENVIRONMENT)
    if not wanted:
        for implementation in implementations:
            if implementation.unsupported(*args) is None:
                return implementation
        reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(op, implementations, args))
        raise BackendError(f"no implementation of {op} takes this call: {reasons}")
    if wanted not in BACKENDS:
        raise ArgumentError(f"{said_by} = {wanted!r} is not known: use one of {', '.join(BACKENDS)}, or leave it unset")
    for implementation in implementations:
        if implementation.name == wanted:
            reason = implementation.unsupported(*args)
            if reason is None:
                return implementation
            raise BackendError(
                f"{said_by} = {wanted!r} cannot run {op}: {reason}; leave {said_by} unset to let it choose"
            )
    available = ", ".join(implementation.name for implementation in implementations)
    raise BackendError(f"{said_by} = {wanted!r} cannot run {op}: it is not implemented there; use one of {available}")


def _from_environment() -> str | None:
    # `get` raises and catches where there is none, which takes twice as long
    return os.environ[ENVIRONMENT] if ENVIRONMENT in os.environ else None  # noqa: SIM401


def explain(op: str, implementations: Sequence[Implementation], args: Sequence[Any]) -> list[tuple[str, str | None]]:
    """Every backend with None if it would take a call of `op` with `args`, otherwise the reason why not."""
    known = {implementation.name: implementation for implementation in implementations}
    missing = f"{op} is not implemented there"
    return [(name, known[name].unsupported(*args) if name in known else missing) for name in BACKENDS]
