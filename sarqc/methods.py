"""The methods: what each is, its solver, and its own values of the options in `sarqc.config.MethodConfig`.

A name gets its meaning here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sarqc.kinds import AUTO, PRIOR, Kind
from sarqc.options import refusal, warn_renamed

DEFAULT_METHOD = "sarqc-gptq"
DEFAULT_EFFORT: Literal["default"] = "default"
CALIBRATION, FEEDBACK = "calibration data", "error feedback"
"""What options of a method may need to have an effect."""


@dataclass(frozen=True)
class Method:
    """A method: its solver and its own values of the options in `MethodConfig`.

    Attributes:
        solver: Name of the solver that finds the codes: "rtn", "gptq", or one added with `register_solver`.
        about: What it is, in a line.
        calibrated: Whether it uses calibration data.
        channel_scales: Whether channel scales are searched first, as AWQ does.
        own: Its values of options, where they are not the usual ones.
    """

    solver: str
    about: str
    calibrated: bool = True
    channel_scales: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)

    def offers(self, what: str) -> bool:
        """Whether options that need this have an effect."""
        return not what or (self.calibrated if what == CALIBRATION else self.solver != "rtn")


_UNREGULARIZED = {"reg_lambda": 0.0, "saliency": "iso", "expert_shrinkage": 0.0}
_RTN = {"act_order": "none"}
_GPTQ = _UNREGULARIZED | {"reg_lambda": 0.01, "scales": "minmax", "act_order": "static", "damp": 0.0}
_FULL = {"cd_passes": 2, "error_correction": True}

EFFORTS: dict[str, Mapping[str, Mapping[Any, Any]]] = {
    "fast": {"reg_lambda": {AUTO: PRIOR}, "cd_passes": {2: 0}, "error_correction": {True: False}},
    "default": {},
    "best": {"cd_passes": {2: 8}},
}
"""What an effort puts in the place of a method's own values, by option. A method never gets what it is not made of."""

METHODS: dict[str, Method] = {
    "rtn": Method(
        "rtn", "round to nearest, min-max scales; no calibration data", calibrated=False,
        own=_RTN | _UNREGULARIZED | {"scales": "minmax"},
    ),
    "rtn-search": Method("rtn", "round to nearest, searched scales", own=_RTN | _UNREGULARIZED),
    "awq": Method("rtn", "AWQ channel scales, searched scales", channel_scales=True, own=_RTN | _UNREGULARIZED),
    "rqc-awq": Method("rtn", "AWQ, regularised uniformly", channel_scales=True, own=_RTN | {"saliency": "iso"}),
    "sarqc-awq": Method("rtn", "AWQ, regularised by saliency", channel_scales=True, own=_RTN),
    "gptq": Method("gptq", "GPTQ as GPTQ tools ship it", own=_GPTQ),
    "rqc-gptq": Method("gptq", "GPTQ, regularised uniformly, searched scales", own={"saliency": "iso", "cd_passes": 2}),
    "sarqc-gptq": Method("gptq", "GPTQ, regularised by saliency, residual error correction", own=_FULL),
    "sarqc-awq-gptq": Method("gptq", "AWQ channel scales, then sarqc-gptq", channel_scales=True, own=_FULL),
}  # fmt: skip
"""Methods by name. `gptq` is GPTQ with damping 0.01 of the mean diagonal, min-max scales and static activation order.

`awq` is AWQ's search (arXiv 2306.00978) over 20 exponents of E|x_j|, s divided by sqrt(max s * min s), without a
regulariser; then a search for the scale of every group; then RTN. It differs from AWQ tools in four ways. A candidate
is measured by the output error of the Linears that read the tensor, not of the whole attention or MLP. Scales are
searched for q and k too, and symmetric scales may be negative. Channel scales go into v_proj also where several heads
share it. Channel scales are powers of two where they touch a tensor that is not quantized, a router's or a bias, so
that they add no rounding error.
"""
OLD_METHODS = {"sarqc": "sarqc-awq-gptq"}


def method_name() -> Kind:
    """Names in `METHODS`; an earlier name becomes the present one, with a warning."""

    def check(value: Any) -> str:
        if isinstance(value, str) and value in OLD_METHODS and value not in METHODS:
            warn_renamed(f"method {value}", OLD_METHODS[value])
            return OLD_METHODS[value]
        if not isinstance(value, str) or value not in METHODS:
            raise refusal("method", value, f"one of {', '.join(METHODS)}")
        return value

    return Kind("the name of a method", check, str, metavar="NAME")
