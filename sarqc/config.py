"""The options of a run, each once: what the weights become, how they get there, on which text, and with what means.

    QuantConfig(bits=3, group_size=64)        the number format
    MethodConfig("gptq", act_order="none")    the method and its options
    CalibrationConfig("wikitext")             the calibration data
    RunConfig(device="cuda:0")                device, budgets, work folder

To add an option, add a field here and read it where it acts. Flags, keywords, help, `--config` files, the fingerprint
of a run and the model card follow from the field; `make keywords` renews the keywords that editors complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from sarqc import kinds
from sarqc.errors import ArgumentError
from sarqc.kinds import AUTO, PRIOR, Kind
from sarqc.methods import CALIBRATION, DEFAULT_EFFORT, DEFAULT_METHOD, EFFORTS, FEEDBACK, METHODS, Method, method_name
from sarqc.options import Config, default_of, described, option, options, shown, split_by_config
from sarqc.quant_config import QuantConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = [
    "AUTO",
    "BUILTIN",
    "DEFAULT_EFFORT",
    "DEFAULT_METHOD",
    "EFFORTS",
    "GRAM_BUDGET",
    "METHODS",
    "MIN_SEQLEN",
    "QUANTIZE",
    "CalibrationConfig",
    "Configs",
    "MethodConfig",
    "QuantConfig",
    "RunConfig",
    "check_seed",
]

DEFAULT_SAMPLES, DEFAULT_SEQLEN, MIN_SEQLEN = 128, 2048, 16
GRAM_BUDGET = 16 * kinds.GB
BUILTIN = "builtin"
"""Name of the data set that comes with Python: its language reference."""


# -- the method -------------------------------------------------------------------------------------------------------


def _own(usual: Any, kind: Kind, help: str, needs: str = "", **rest: Any) -> Any:
    """An option of which each method has its own value; `usual` is what most have."""
    return option(None, kind, help, usual=kind.check(usual), needs=needs, **rest)


@described
@dataclass(frozen=True)
class MethodConfig(Config):
    """A method with its options. One that is left out, or None, becomes the method's own when the object is made."""

    panel: ClassVar[str] = "Method"

    method: str = option(DEFAULT_METHOD, method_name(), "Quantization method; --help lists them.")
    effort: Literal["fast", "default", "best"] = option(
        DEFAULT_EFFORT,
        kinds.one_of(*EFFORTS),
        "Preset for the options below. fast: no search for lambda, no coordinate descent, no error correction. "
        "best: more coordinate descent.",
        resume="derived",
        needs=CALIBRATION,
    )
    reg_lambda: float | Literal["auto", "prior"] = _own(
        AUTO,
        kinds.auto_or(kinds.number(0), PRIOR),
        "Regularisation lambda, relative to the mean of diag(H). auto: chosen on held-out calibration data. prior: "
        "from the number of inputs and of calibration rows.",
        CALIBRATION,
        old=("strength",),
    )
    saliency: str = _own(
        "energy",
        kinds.text("iso, abs, rms, energy or power:A with A from 0 to 4", kinds.saliency_exponent),
        "Weight of each input channel in the regulariser: iso, abs, rms, energy (diag(H)) or power:A (diag(H)^A).",
        CALIBRATION,
    )
    cd_passes: int = _own(
        0,
        kinds.whole(0),
        "Passes of coordinate descent over codes and scales after GPTQ. Each takes about half as long as GPTQ.",
        FEEDBACK,
        old=("sweeps",),
    )
    error_correction: bool = _own(
        False,
        kinds.switch(),
        "Residual error correction: layers that write to the residual stream compensate the error before them, "
        "as far as held-out data supports it. Doubles the forward passes.",
        FEEDBACK,
        old=("carry_error",),
    )
    expert_shrinkage: float = _own(
        0.25,
        kinds.number(0),
        "Shrinkage of each expert's Hessian to the pooled Hessian of its layer, in pooled rows per input channel.",
        CALIBRATION,
        old=("borrow",),
    )
    router_weight_power: int = _own(
        0,
        kinds.whole(0, 2),
        "Power of the router weight by which a token counts in an expert's Hessian. 2 is least squares of the layer "
        "output.",
        CALIBRATION,
        old=("gate_weight",),
    )
    scales: Literal["minmax", "search"] = _own(
        "search", kinds.one_of("minmax", "search"), "Scales of groups: from minimum and maximum, or by MSE search."
    )
    act_order: Literal["none", "static", "group"] = _own(
        "group",
        kinds.one_of("none", "static", "group"),
        "Column order of GPTQ: none, static (by diag(H), scales fixed before) or group (group-aware reordering). "
        "None of them stores a g_idx.",
        FEEDBACK,
    )
    damp: float = _own(
        1e-4,
        kinds.number(0, 1, below=True),
        "Damping added to the diagonal of the Hessian, relative to its mean (damp_percent / 100).",
        CALIBRATION,
    )

    def __post_init__(self) -> None:
        for name in ("method", "effort"):
            object.__setattr__(self, name, options(MethodConfig)[name].keep(name, getattr(self, name)))
        left_out = [name for name in options(MethodConfig) if getattr(self, name) is None]
        object.__setattr__(self, "_left_out", left_out)
        for name in left_out:
            object.__setattr__(self, name, self.own(name))
        super().__post_init__()
        for name, one in options(MethodConfig).items():
            if not self._row.offers(one.needs) and getattr(self, name) != self.own(name):
                able = ", ".join(other for other, row in METHODS.items() if row.offers(one.needs))
                raise ArgumentError(
                    f"{name} = {getattr(self, name)!r} has no effect with method {self.method!r}, which has no "
                    f"{one.needs}: leave it out, or use one of {able}"
                )

    @property
    def _row(self) -> Method:
        return METHODS[self.method]

    def own(self, name: str) -> Any:
        """The method's own value of the option `name`, at this effort."""
        if name == "effort":
            return DEFAULT_EFFORT
        own = self._row.own.get(name, options(MethodConfig)[name].usual)
        return EFFORTS[self.effort].get(name, {}).get(own, own)

    @classmethod
    def made(cls, base: Self | None, given: Mapping[str, Any]) -> Self:
        """`base` with the options `given`; another effort also changes what was left out of `base`."""
        if base is not None and "effort" in given:
            given = dict.fromkeys(vars(base)["_left_out"]) | dict(given)
        return super().made(base, given)

    @classmethod
    def default_text(cls, name: str) -> str:
        """The usual value of the option `name`, then methods that have another one, if it has an effect in them."""
        if name in ("method", "effort"):
            return str(default_of(cls, name))
        one, others = options(cls)[name], dict[Any, list[str]]()
        for method, row in METHODS.items():
            if row.offers(one.needs):
                others.setdefault(row.own.get(name, one.usual), []).append(method)
        rest = (
            f"{shown(one, value)} for {', '.join(methods)}" for value, methods in others.items() if value != one.usual
        )
        return "; ".join([shown(one, one.usual), *rest])

    @property
    def solver(self) -> str:
        """Name of the solver that finds the codes."""
        return self._row.solver

    @property
    def calibrated(self) -> bool:
        """Whether the method uses calibration data."""
        return self._row.calibrated

    @property
    def channel_scales(self) -> bool:
        """Whether channel scales are searched first, wherever the model's function stays the same (AWQ)."""
        return self._row.channel_scales

    @property
    def needs_validation(self) -> bool:
        """Whether something is chosen on held-out data, so that calibration data is kept in two folds."""
        return self.calibrated and (self.reg_lambda == AUTO or self.error_correction)


# -- calibration data and the run -------------------------------------------------------------------------------------


@described
@dataclass(frozen=True)
class CalibrationConfig(Config):
    """The data to calibrate on."""

    panel: ClassVar[str] = "Calibration"

    dataset: str | Path | Tensor | Sequence[Any] = option(
        BUILTIN,
        kinds.dataset(),
        "Calibration data: a file (text, JSON Lines, Parquet), a data set NAME[:CONFIG[:SPLIT]], or builtin (Python's "
        "language reference).",
        resume="derived",
        old=("calib",),
    )
    num_samples: int | None = option(
        None,
        kinds.whole(1),
        "Sequences to calibrate on.",
        default_text=f"{DEFAULT_SAMPLES}, or all of a shorter text",
        resume="derived",
    )
    seqlen: int | None = option(
        None,
        kinds.whole(MIN_SEQLEN),
        "Tokens per sequence.",
        default_text=f"{DEFAULT_SEQLEN}, or all positions of a shorter model",
        resume="derived",
    )
    column: str | None = option(
        None,
        kinds.text("the name of a column"),
        "Column to read, of files and data sets that have columns.",
        default_text="messages, conversations, text or input_ids",
        resume="derived",
    )
    seed: int = option(0, kinds.whole(0, (1 << 63) - 1), "Seed of the choice of sequences and of validation rows.")


@described
@dataclass(frozen=True)
class RunConfig(Config):
    """Device, budgets, work folder: what a run uses."""

    panel: ClassVar[str] = "Run"
    removed: ClassVar[Mapping[str, str]] = {
        "keep_work": "`sarqc convert` writes a finished checkpoint in another format"
    }

    device: str = option(AUTO, kinds.text("auto, cpu, cuda or cuda:N"), "auto, cpu, cuda or cuda:N.", resume="free")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        AUTO,
        kinds.one_of("auto", "float32", "bfloat16", "float16"),
        "Data type of activations. auto: the checkpoint's, or float32 on a CPU that is not fast in bfloat16.",
        resume="derived",
    )
    micro_batch: int | None = option(
        None,
        kinds.whole(1),
        "Sequences in one forward pass.",
        default_text="as many as hold 1024 tokens on a CPU (2048 in 16 bits), 8192 on a GPU",
        resume="free",
    )
    gram_budget: int = option(
        GRAM_BUDGET,
        kinds.size_in_bytes(1),
        "Memory for Gram matrices. Experts beyond it are summed in further portions.",
        resume="free",
    )
    activation_budget: int | None = option(
        None,
        kinds.size_in_bytes(0),
        "Memory for hidden states. Beyond it they are offloaded to a file in the work folder.",
        default_text="a quarter of this machine's memory",
        resume="free",
        old=("state_budget",),
    )
    work_dir: str | Path | None = option(
        None,
        kinds.place(),
        "Folder for finished blocks.",
        default_text="a hidden folder beside the output",
        resume="free",
        old=("work",),
    )
    resume: bool = option(
        True,
        kinds.switch(),
        "Resume from finished blocks in the work folder.",
        resume="free",
        old_opposite=("restart",),
    )
    overwrite: bool = option(
        False,
        kinds.switch(),
        "Replace the output folder once the new one is complete.",
        flag="--overwrite",
        resume="free",
    )
    ordered: bool = option(
        False,
        kinds.switch(),
        "Deterministic reduction: results of several ranks match a single process bit for bit.",
        flag="--ordered",
        resume="free",
    )
    trust_remote_code: bool = option(
        False,
        kinds.switch(),
        "Run Python code that comes with the model. Off: such models are refused.",
        flag="--trust-remote-code",
        resume="free",
    )


@dataclass(frozen=True)
class Configs:
    """The four configurations of a run."""

    quant: QuantConfig
    method: MethodConfig
    calibration: CalibrationConfig
    run: RunConfig

    @classmethod
    def of(
        cls,
        quant: QuantConfig | None = None,
        method: str | MethodConfig | None = None,
        calibration: CalibrationConfig | None = None,
        run: RunConfig | None = None,
        **options: Any,
    ) -> Configs:
        """From configurations, their fields as keywords, or both; a keyword changes the field of a configuration.

        Raises:
            ArgumentError: An unknown keyword, a value that an option does not take, or two that exclude each other.
        """
        given = split_by_config(QUANTIZE, options)
        if method is not None and not isinstance(method, MethodConfig):
            given[MethodConfig]["method"], method = method, None
        return cls(
            QuantConfig.made(quant, given[QuantConfig]),
            MethodConfig.made(method, given[MethodConfig]),
            CalibrationConfig.made(calibration, given[CalibrationConfig]),
            RunConfig.made(run, given[RunConfig]),
        )


def check_seed(seed: int) -> None:
    """`ArgumentError` for what is no seed of `torch.Generator`."""
    options(CalibrationConfig)["seed"].keep("seed", seed)


QUANTIZE: tuple[type[Config], ...] = (QuantConfig, MethodConfig, CalibrationConfig, RunConfig)
"""The configurations of `sarqc quantize`."""
