"""What to do, as two small frozen records: `QuantSpec` says what the weights become, `SolveSpec` how they get there.

Both check themselves when made, survive a JSON round trip, and hold no tensors. The table of methods at the end of
the file is the only place where a method's name gets its meaning.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sarqc.errors import ArgumentError

AUTO: Literal["auto"] = "auto"
GridSearch = Literal["minmax", "search"]
Order = Literal["none", "static", "group"]


@dataclass(frozen=True)
class QuantSpec:
    """The number format of the quantized weights.

    bits: 2 to 8. group_size: inputs that share one scale, or -1 for one scale per output row.
    sym: the zero is the middle code 2^(bits-1) everywhere; otherwise each group stores an integer zero.
    ignore: regular expressions; a Linear whose full name one of them finds stays as it is.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ArgumentError(f"bits = {self.bits!r} is out of range: use a whole number from 2 to 8")
        if self.group_size != -1 and (not isinstance(self.group_size, int) or self.group_size < 8):
            raise ArgumentError(
                f"group_size = {self.group_size!r} is not usable: use 32, 64 or 128 (any whole number from 8), "
                "or -1 for one scale per output row"
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    def groups(self, in_features: int) -> int:
        """Groups per row of a Linear with `in_features` inputs; `ArgumentError` where they do not divide."""
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise ArgumentError(f"group_size = {self.group_size} does not divide {in_features} inputs")
        return in_features // self.group_size


@dataclass(frozen=True)
class SolveSpec:
    """How codes are chosen.

    method: name in `METHODS`. gram: whether calibration data is used at all.
    strength: lambda, the weight of the regulariser relative to the mean of diag(H); "auto" chooses it from the data.
    saliency: what the regulariser is weighted with: "iso", "abs", "rms", "energy" or "power:A" (diag(H)^A).
    grid: "minmax" spans each group; "search" shrinks that span to the least weighted error.
    act_order: order of the columns: "none", "static" (by saliency, grid fixed before) or "group" (groups by saliency
    and columns inside each group, grid fitted as the solver arrives). None of them needs a g_idx on disk.
    damp: floor added to the diagonal, relative to its mean. seed: of every random draw of the run.
    """

    method: str = "sarqc-gptq"
    gram: bool = True
    strength: float | Literal["auto"] = AUTO
    saliency: str = "energy"
    grid: GridSearch = "search"
    act_order: Order = "group"
    damp: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strength != AUTO and not (isinstance(self.strength, int | float) and 0 <= self.strength < float("inf")):
            raise ArgumentError(f"strength = {self.strength!r} is not usable: use 'auto' or a number from 0 up")
        saliency_exponent(self.saliency)
        for name, accepted in (("grid", get_args(GridSearch)), ("act_order", get_args(Order))):
            value = getattr(self, name)
            if value not in accepted:
                raise ArgumentError(f"{name} = {value!r} is not known: use one of {', '.join(accepted)}")
        if not 0 <= self.damp < 1:
            raise ArgumentError(f"damp = {self.damp!r} is out of range: use a number from 0 up to 1")


def saliency_exponent(saliency: str) -> float | None:
    """Exponent A of diag(H)^A behind a saliency's name; None for "abs", which uses E|x_j| instead."""
    named: dict[str, float | None] = {"iso": 0.0, "rms": 0.5, "energy": 1.0, "abs": None}
    if saliency in named:
        return named[saliency]
    if saliency.startswith("power:"):
        try:
            exponent = float(saliency.removeprefix("power:"))
        except ValueError:
            exponent = -1.0
        if 0 <= exponent <= 4:
            return exponent
    raise ArgumentError(
        f"saliency = {saliency!r} is not known: use iso, abs, rms, energy or power:A with A from 0 to 4"
    )


METHODS: dict[str, SolveSpec] = {
    "rtn": SolveSpec(method="rtn", gram=False, strength=0.0, saliency="iso", grid="minmax", act_order="none"),
    "gptq": SolveSpec(method="gptq", strength=0.01, saliency="iso", grid="minmax", act_order="static", damp=0.0),
    "rqc-gptq": SolveSpec(method="rqc-gptq", saliency="iso"),
    "sarqc-gptq": SolveSpec(method="sarqc-gptq", saliency="energy"),
}
"""Presets: plain rounding; the Gram solver as the common tools ship it; regularised; regularised by saliency."""


def solve_spec(method: str = "sarqc-gptq", **changes: Any) -> SolveSpec:
    """The preset called `method` with some of its fields changed; None as a value means "as the preset has it"."""
    if method not in METHODS:
        raise ArgumentError(f"method = {method!r} is not known: use one of {', '.join(METHODS)}")
    return dataclasses.replace(METHODS[method], **{k: v for k, v in changes.items() if v is not None})


def to_json(spec: QuantSpec | SolveSpec) -> dict[str, Any]:
    """A spec as plain JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(spec).items()}


def from_json(kind: type[QuantSpec] | type[SolveSpec], values: dict[str, Any]) -> QuantSpec | SolveSpec:
    """The spec that `to_json` wrote; an unknown key is an error that names it."""
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ArgumentError(f"{kind.__name__} has no field {unknown[0]!r}: it has {', '.join(sorted(known))}")
    return kind(**values)
