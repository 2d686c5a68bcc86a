"""What to do, as two small frozen records: `QuantSpec` says what the weights become, `SolveSpec` how they get there.

Both check themselves when made, survive a JSON round trip, and hold no tensors. The table of methods at the end of
the file is the only place where a method's name gets its meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sarqc.errors import ArgumentError

AUTO: Literal["auto"] = "auto"
DEFAULT_METHOD = "sarqc-gptq"
Solver = Literal["round", "gram"]
GridSearch = Literal["minmax", "search"]
Order = Literal["none", "static", "group"]


CHOICES = (2, 3, 4, 5, 6, 8)
"""Widths that `avg_bits` chooses from, if nothing else is said."""


def _is_width(bits: object) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8


def _several(values: Any) -> tuple[Any, ...]:
    """Values as a tuple; one alone, of which a string is one, is a tuple of it."""
    return (values,) if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)


GRAM_BUDGET = 16 << 30


@dataclass(frozen=True)
class QuantSpec:
    """The number format of the quantized weights.

    bits: 2 to 8. group_size: inputs that share one scale, or -1 for one scale per output row.
    sym: the zero is the middle code 2^(bits-1) everywhere; otherwise each group stores an integer zero.
    ignore: regular expressions; a Linear whose full name one of them finds stays as it is.
    avg_bits: where layers get different widths, bits of a weight on average, scales and zeros included; `bits` is then
    no layer's in particular. choices: the widths to choose from, rising; none without avg_bits.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    ignore: Sequence[str] = ()
    avg_bits: float | None = None
    choices: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not _is_width(self.bits):
            raise ArgumentError(f"bits = {self.bits!r} is out of range: use a whole number from 2 to 8")
        if self.group_size != -1 and (not isinstance(self.group_size, int) or self.group_size < 8):
            raise ArgumentError(
                f"group_size = {self.group_size!r} is not usable: use 32, 64 or 128 (any whole number from 8), "
                "or -1 for one scale per output row"
            )
        object.__setattr__(self, "ignore", _several(self.ignore))
        object.__setattr__(self, "choices", _several(self.choices))
        if self.avg_bits is None:
            if self.choices:
                raise ArgumentError(f"bits_choices = {self.choices} chooses nothing: give avg_bits too")
            return
        number = isinstance(self.avg_bits, int | float) and not isinstance(self.avg_bits, bool)
        if not number or not 2 <= self.avg_bits <= 16:
            raise ArgumentError(f"avg_bits = {self.avg_bits!r} is not usable: use a number like 3.5")
        if not all(map(_is_width, self.choices)):
            raise ArgumentError(f"bits_choices = {self.choices} is not usable: use whole numbers from 2 to 8")
        object.__setattr__(self, "choices", tuple(sorted(set(self.choices or CHOICES))))

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    def at(self, bits: int) -> QuantSpec:
        """What layers of this width follow, where they have different ones."""
        return dataclasses.replace(self, bits=bits, avg_bits=None, choices=())

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

    method: name in `METHODS`. gram: whether calibration data is used at all; the other fields need it.
    solver: "round" takes the nearest code, "gram" corrects each column's error in the columns that follow.
    channel_scale: whether inputs are rescaled first, by a search, wherever the model stays the same (AWQ's idea).
    strength: lambda, the weight of the regulariser relative to the mean of diag(H); "auto" chooses it from the data.
    saliency: what the regulariser is weighted with: "iso", "abs", "rms", "energy" or "power:A" (diag(H)^A).
    grid: "minmax" spans each group; "search" shrinks that span to the least weighted error.
    act_order: order of the Gram solver's columns: "none", "static" (by saliency, grid fixed before) or "group" (groups
    by saliency and columns inside each group, grid fitted as the solver arrives). None of them needs a g_idx on disk.
    sweeps: times that codes and scales are improved in turn after the Gram solver's pass (`method.coordinate_descent`).
    damp: floor added to the diagonal, relative to its mean. borrow: rows, for each input, that an expert's statistics
    have from the average of its layer. gate_weight: power of the router's weight by which a row counts in an expert's
    statistics, 0, 1 or 2. carry_error: whether a layer of each block also makes up for the errors of all before it, as
    far as held-out text says that this helps. seed: of every random draw of the run.
    """

    method: str = DEFAULT_METHOD
    gram: bool = True
    solver: Solver = "gram"
    channel_scale: bool = False
    strength: float | Literal["auto"] = AUTO
    saliency: str = "energy"
    grid: GridSearch = "search"
    act_order: Order = "group"
    sweeps: int = 0
    damp: float = 1e-4
    borrow: float = 0.25
    gate_weight: int = 0
    carry_error: bool = False
    seed: int = 0

    @property
    def judges(self) -> bool:
        """Whether something is chosen on text that it was not fitted on, so that the text must be kept in two folds."""
        return self.gram and (self.strength == AUTO or self.carry_error)

    def __post_init__(self) -> None:
        if self.strength != AUTO and not (isinstance(self.strength, int | float) and 0 <= self.strength < float("inf")):
            raise ArgumentError(f"strength = {self.strength!r} is not usable: use 'auto' or a number from 0 up")
        saliency_exponent(self.saliency)
        known = (("solver", get_args(Solver)), ("grid", get_args(GridSearch)), ("act_order", get_args(Order)))
        for name, accepted in known:
            value = getattr(self, name)
            if value not in accepted:
                raise ArgumentError(f"{name} = {value!r} is not known: use one of {', '.join(accepted)}")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise ArgumentError(f"sweeps = {self.sweeps!r} is not usable: use a whole number from 0 up")
        if self.sweeps and self.solver != "gram":
            raise ArgumentError(
                f"sweeps = {self.sweeps} is not for method {self.method!r}, which rounds: only what Gram solvers find "
                f"is improved; use {_gram_methods()}"
            )
        if not 0 <= self.damp < 1:
            raise ArgumentError(f"damp = {self.damp!r} is out of range: use a number from 0 up to 1")
        if not 0 <= self.borrow < float("inf"):
            raise ArgumentError(f"borrow = {self.borrow!r} is out of range: use a number from 0 up")
        check_seed(self.seed)
        if isinstance(self.gate_weight, bool) or self.gate_weight not in (0, 1, 2):
            raise ArgumentError(f"gate_weight = {self.gate_weight!r} is not known: use 0, 1 or 2")
        if self.carry_error and self.solver != "gram":
            raise ArgumentError(
                f"carry_error = True is not for method {self.method!r}: only Gram solvers can aim elsewhere than at "
                f"the weights; use {_gram_methods()}"
            )
        if not self.gram and (self.solver == "gram" or self.channel_scale):
            raise ArgumentError("gram = False leaves nothing to solve with: use solver 'round' and no channel_scale")


def check_seed(seed: int) -> None:
    """`ArgumentError` for what is no seed of `torch.Generator`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ArgumentError(f"seed = {seed!r} is out of range: use a whole number from 0 to {(1 << 63) - 1}")


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


_FREE: dict[str, Any] = {"strength": 0.0, "saliency": "iso", "borrow": 0.0}
_ROUND: dict[str, Any] = {"solver": "round", "act_order": "none"}
_GPTQ: dict[str, Any] = _FREE | {"strength": 0.01, "grid": "minmax", "act_order": "static", "damp": 0.0}
_TABLE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("rtn", "plain rounding on min-max grids; needs no text", _ROUND | _FREE | {"gram": False, "grid": "minmax"}),
    ("rtn-search", "rounding on grids searched for the least output error", _ROUND | _FREE),
    ("awq", "channel scales, then such grids: as the common tools", _ROUND | _FREE | {"channel_scale": True}),
    ("rqc-awq", "the same, regularised evenly", _ROUND | {"channel_scale": True, "saliency": "iso"}),
    ("sarqc-awq", "the same, regularised by saliency", _ROUND | {"channel_scale": True}),
    ("gptq", "the Gram solver as the common tools ship it", _GPTQ),
    ("rqc-gptq", "Gram solver, regularised evenly, searched grids", {"saliency": "iso", "sweeps": 2}),
    ("sarqc-gptq", "by saliency; one layer a block makes up for earlier errors", {"sweeps": 2, "carry_error": True}),
    (
        "sarqc",
        "channel scales by search, then as sarqc-gptq",
        {"channel_scale": True, "sweeps": 2, "carry_error": True},
    ),
)
METHODS: dict[str, SolveSpec] = {name: SolveSpec(method=name, **fields) for name, _, fields in _TABLE}
"""Presets. `gptq` is what GPTQ tools do: damping 0.01 of the mean diagonal, min-max grids, static activation order.

`awq` is AWQ's search (arXiv 2306.00978) over 20 exponents of E|x_j|, s divided by sqrt(max s * min s), no regulariser,
then a search for the span of every group, then rounding. It differs from the tools in four ways. A candidate is judged
by the output error of the Linears that read the tensor, not of the whole attention or MLP. Spans are searched over the
factors of all our grids, for q and k too, and symmetric grids may have scales below zero. Scales go into v_proj also
where several heads share it. Scales are powers of two where they touch a tensor that is not quantized, a router's or a
bias, so that nothing is rounded on the way.
"""
ABOUT: dict[str, str] = {name: line for name, line, _ in _TABLE}
"""What each method is, in a line."""


def _gram_methods() -> str:
    return ", ".join(name for name, spec in METHODS.items() if spec.solver == "gram")


def solve_spec(method: str = DEFAULT_METHOD, **changes: Any) -> SolveSpec:
    """The preset called `method` with some of its fields changed; None as a value means "as the preset has it"."""
    if method not in METHODS:
        raise ArgumentError(f"method = {method!r} is not known: use one of {', '.join(METHODS)}")
    preset, given = METHODS[method], {k: v for k, v in changes.items() if v is not None}
    idle = next((name for name in ("strength", "saliency", "borrow", "gate_weight") if name in given), None)
    if idle and not preset.gram:
        raise ArgumentError(
            f"{idle} = {given[idle]!r} is not for method {method!r}, which looks at no text: leave it out"
        )
    return dataclasses.replace(preset, **given)


def to_json(spec: QuantSpec | SolveSpec) -> dict[str, Any]:
    """A spec as plain JSON values, without what says that layers differ where they do not."""
    uniform = ("avg_bits", "choices") if isinstance(spec, QuantSpec) and spec.avg_bits is None else ()
    values = {k: v for k, v in dataclasses.asdict(spec).items() if k not in uniform}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def from_json(kind: type[QuantSpec] | type[SolveSpec], values: dict[str, Any]) -> QuantSpec | SolveSpec:
    """The spec that `to_json` wrote; an unknown key is an error that names it."""
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ArgumentError(f"{kind.__name__} has no field {unknown[0]!r}: it has {', '.join(sorted(known))}")
    return kind(**values)
