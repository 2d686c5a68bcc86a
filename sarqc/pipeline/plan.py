"""A run before it runs: what was asked for, and what comes of it once names, shapes and settings are checked.

A plan needs a configuration and the headers of the weights, nothing more, so one can be made for a model whose weights
are on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sarqc.checkpoint.formats import FORMATS, Format
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.config import AUTO, DEFAULT_METHOD, GRAM_BUDGET, QuantSpec, SolveSpec, solve_spec
from sarqc.errors import ArgumentError, CheckpointError, ModelError
from sarqc.method.bit_allocation import average_range
from sarqc.model import dataset
from sarqc.model.config_only import Outline, outline
from sarqc.model.hub import hub_configuration, hub_headers, is_local, locate
from sarqc.model.layers import Targets, auto_group_size, check_group_size, targets
from sarqc.model.lazy_model import Skeleton
from sarqc.model.source import TensorSource
from sarqc.model.tokenizer import load_tokenizer
from sarqc.pipeline.streams import windows_at_once
from sarqc.system import host_memory, ranks_here, resolve_device, resolve_dtype

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 2048
_LEAST = {"micro_batch": 1, "gram_budget": 1, "state_budget": 0, "num_samples": 1, "seqlen": dataset.MIN_SEQLEN}


@dataclass(frozen=True)
class Settings:
    """What may be asked of a run; the arguments of `sarqc.quantize`, which explains them."""

    method: str = DEFAULT_METHOD
    bits: int = 4
    avg_bits: float | None = None
    bits_choices: Sequence[int] = ()
    group_size: int | Literal["auto"] = AUTO
    sym: bool = True
    strength: float | Literal["auto"] | None = None
    saliency: str | None = None
    borrow: float | None = None
    gate_weight: int | None = None
    sweeps: int | None = None
    carry_error: bool | None = None
    calib: str | Path | Tensor = dataset.BUILTIN
    num_samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    micro_batch: int | None = None
    gram_budget: int = GRAM_BUDGET
    state_budget: int | None = None
    ignore: Sequence[str] = ()
    format: str = "compressed-tensors"
    tp: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """A run with every choice made that needs no weights.

    model: as it was named. source: its tensors, by name and shape at least. notes: choices worth telling.
    """

    model: str
    folder: Path
    source: TensorSource
    skeleton: Skeleton
    targets: Targets
    quant: QuantSpec
    solve: SolveSpec
    format: Format
    device: torch.device
    dtype: torch.dtype
    settings: Settings
    notes: tuple[str, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's weights; `ModelError` where only their headers are here."""
        if not isinstance(self.source, Checkpoint):
            raise ModelError(f"the weights of {self.model} are not in {self.folder}: fetch them first")
        return self.source

    @property
    def seqlen(self) -> int:
        """Tokens per window of text: as asked, or 2048, or as many as the model has positions; `ArgumentError` for a
        longer one, which the model was never trained to read."""
        asked, config = self.settings.seqlen, self.skeleton.model.config
        if asked is None:
            return min(DEFAULT_SEQLEN, dataset.positions(config) or DEFAULT_SEQLEN)
        dataset.check_seqlen(asked, config, self.model)
        return asked

    @property
    def state_budget(self) -> int:
        """Bytes of hidden states that stay in memory: by default a quarter of what a rank has of this machine."""
        asked = self.settings.state_budget
        return host_memory() // ranks_here() // 4 if asked is None else asked

    def micro_batch(self, seqlen: int) -> int:
        """Windows that go through a block at once."""
        return self.settings.micro_batch or windows_at_once(self.device, seqlen)


def make_plan(model: str | Path, settings: Settings, *, headers_only: bool = False) -> Plan:
    """The plan for a model by name; `SarqcError` for whatever can be refused by now.

    headers_only: do not fetch weights from a hub, and take a folder that has none.
    """
    if settings.format not in FORMATS:
        raise ArgumentError(f"format = {settings.format!r} is not known: use {', '.join(FORMATS)}")
    for name, least in _LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ArgumentError(f"{name} = {value} is too small: use {least} or more")
    size = 128 if settings.group_size == AUTO else settings.group_size
    quant = QuantSpec(settings.bits, size, settings.sym, settings.ignore, settings.avg_bits, settings.bits_choices)
    asked = ("strength", "saliency", "borrow", "gate_weight", "sweeps", "carry_error", "seed")
    solve = solve_spec(settings.method, **{name: getattr(settings, name) for name in asked})
    if not (headers_only or is_local(model)):
        _refuse_unfetched(model, settings, quant, solve)
    return _fitted(model, settings, quant, solve, *_open(model, settings.trust_remote_code, headers_only))


def _refuse_unfetched(model: str | Path, settings: Settings, quant: QuantSpec, solve: SolveSpec) -> None:
    """What headers refuse, before hundreds of GB are fetched; where the hub gives none, as it does for what was fetched
    before and there is no network, the weights are waited for."""
    folder = hub_configuration(str(model), trust_remote_code=settings.trust_remote_code)
    try:
        tensors = hub_headers(str(model))
    except ModelError:
        return
    if tensors:
        _fitted(model, settings, quant, solve, folder, Outline(tensors))


def _fitted(
    model: str | Path, settings: Settings, quant: QuantSpec, solve: SolveSpec, folder: Path, source: TensorSource
) -> Plan:
    """The plan, with settings that fit the tensors of the model."""
    chosen = FORMATS[settings.format]
    skeleton = Skeleton.from_folder(folder, source, trust_remote_code=settings.trust_remote_code)
    found = targets(skeleton, quant)
    notes: tuple[str, ...] = ()
    if settings.group_size == AUTO:
        quant = replace(quant, group_size=auto_group_size(found))
        notes = (f"group size {quant.group_size}: the largest of 128, 64, 32 that divides every layer's inputs",)
    check_group_size(found, quant)
    if quant.avg_bits is not None:
        quant = _mixed(quant, solve, found)
        choices = ", ".join(map(str, quant.choices))
        notes += (f"bits of each layer: chosen after the first pass, out of {choices}; {quant.avg_bits:g} on average",)
    chosen.check(quant)
    for target in found.selected:
        chosen.check_layer(target.linear, target.shape, quant)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device, skeleton.dtype)
    return Plan(str(model), folder, source, skeleton, found, quant, solve, chosen, device, dtype, settings, notes)


def _mixed(quant: QuantSpec, solve: SolveSpec, found: Targets) -> QuantSpec:
    """A spec of different widths, with the least of them that is no less than the average as the one to reckon with;
    `ArgumentError` for an average that cannot be reached."""
    assert quant.avg_bits is not None
    if not solve.gram:
        raise ArgumentError(
            f"avg_bits = {quant.avg_bits} needs losses measured on text, and method {solve.method} looks at none: "
            "use another method"
        )
    least, most = average_range([target.shape for target in found.selected], quant)
    if not least <= quant.avg_bits <= most:
        raise ArgumentError(
            f"avg_bits = {quant.avg_bits} is out of range: with scales, {min(quant.choices)} to {max(quant.choices)} "
            f"bits take {least:.3f} to {most:.3f}"
        )
    return replace(quant, bits=min(width for width in quant.choices if width >= min(quant.avg_bits, quant.choices[-1])))


def _open(model: str | Path, trust_remote_code: bool, headers_only: bool) -> tuple[Path, TensorSource]:
    """A model's folder and its tensors, or only their names and shapes."""
    if headers_only and not is_local(model):
        folder = hub_configuration(str(model), trust_remote_code=trust_remote_code)
        tensors = hub_headers(str(model))
        return folder, Outline(tensors) if tensors else outline(folder, trust_remote_code=trust_remote_code)
    folder = locate(model, trust_remote_code=trust_remote_code)
    if headers_only and not any(folder.glob("*.safetensors")):
        return folder, outline(folder, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    if checkpoint.format is not None:
        raise CheckpointError(f"{folder} is quantized already ({checkpoint.format.name}): give the original model")
    return folder, checkpoint


def read_windows(plan: Plan) -> dataset.Windows | None:
    """The windows to calibrate on; None for a method that looks at no text."""
    asked = plan.settings
    if not plan.solve.gram:
        return None
    if isinstance(asked.calib, Tensor):
        found = dataset.Windows.of_tokens(asked.calib)
    else:
        tokenizer = load_tokenizer(plan.folder, trust_remote_code=asked.trust_remote_code)
        found = dataset.windows(str(asked.calib), tokenizer, part="calibration", seqlen=plan.seqlen)
    count = min(DEFAULT_SAMPLES, found.available) if asked.num_samples is None else asked.num_samples
    return found.draw(count, asked.seed)


def expected_windows(plan: Plan) -> tuple[int, int]:
    """Windows and tokens per window, counted where model and text are here, otherwise as the settings say; (0, 0) for a
    method that looks at no text."""
    asked = plan.settings
    if not plan.solve.gram:
        return 0, 0
    model_here = isinstance(plan.source, Checkpoint)  # and so its tokenizer
    if isinstance(asked.calib, Tensor) or (model_here and dataset.is_here(str(asked.calib))):
        found = read_windows(plan)
        assert found is not None
        return len(found.tokens), found.tokens.shape[1]
    return asked.num_samples or DEFAULT_SAMPLES, plan.seqlen


def settings_of(**values: Any) -> Settings:
    """`Settings` by keyword; `ArgumentError` naming one that does not exist."""
    if unknown := sorted(values.keys() - Settings.__dataclass_fields__.keys()):
        raise ArgumentError(f"{unknown[0]} is no setting: use one of {', '.join(Settings.__dataclass_fields__)}")
    return Settings(**values)
