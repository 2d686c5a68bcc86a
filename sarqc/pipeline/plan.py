"""The plan of a run: its options, and what follows from them once names, shapes and options are checked.

A plan needs a configuration and the headers of the weights, nothing more, so one can be made for a model whose weights
are on another machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sarqc.checkpoint.files import read_json
from sarqc.checkpoint.formats import FORMATS, Format, quantization_of
from sarqc.checkpoint.low_precision import Header, dense_headers, is_low_precision
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.checkpoint.shards import ADAPTER, has_weights
from sarqc.config import (
    AUTO,
    DEFAULT_SAMPLES,
    DEFAULT_SEQLEN,
    CalibrationConfig,
    Configs,
    MethodConfig,
    QuantConfig,
    RunConfig,
)
from sarqc.conventions import MatrixSlice
from sarqc.errors import ArgumentError, CheckpointError, ModelError
from sarqc.method.bit_allocation import average_range
from sarqc.model import dataset
from sarqc.model.calibration_data import counts_at_once, windows
from sarqc.model.candidates import Target
from sarqc.model.config_only import header_source
from sarqc.model.hub import hub_configuration, hub_headers, is_local, locate
from sarqc.model.layers import Targets, auto_group_size, check_group_size, is_wanted, pattern_of, targets
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import HeaderSource, TensorSource
from sarqc.model.tied import separate, untied, untied_file
from sarqc.model.tokenizer import load_tokenizer
from sarqc.pipeline.streams import windows_at_once
from sarqc.system import calibration_dtype, host_memory, ranks_here, resolve_device


@dataclass(frozen=True)
class Plan:
    """A run with every choice made that needs no weights.

    model: as it was named. source: its tensors, by name and shape at least. notes: choices worth telling.
    """

    model: str
    folder: Path
    source: TensorSource
    lazy: LazyModel
    targets: Targets
    quant: QuantConfig
    method: MethodConfig
    calibration: CalibrationConfig
    run: RunConfig
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...]

    @property
    def format(self) -> Format:
        """The format of the checkpoint to write."""
        return FORMATS[self.quant.format]

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
        return dataset.sequence_length(self.calibration.seqlen, DEFAULT_SEQLEN, self.lazy.text_config, self.model)

    @property
    def activation_budget(self) -> int:
        """Bytes of hidden states that stay in memory: by default a quarter of what a rank has of this machine."""
        asked = self.run.activation_budget
        return host_memory() // ranks_here() // 4 if asked is None else asked

    def micro_batch(self, seqlen: int) -> int:
        """Windows that go through a block at once."""
        return self.run.micro_batch or windows_at_once(self.device, seqlen, self.dtype)


def make_plan(model: str | Path, configs: Configs, *, headers_only: bool = False) -> Plan:
    """The plan for a model by name; `SarqcError` for whatever can be refused by now.

    headers_only: do not fetch weights from a hub, and take a folder that has none.
    """
    if configs.quant.format not in FORMATS:
        raise ArgumentError(f"format = {configs.quant.format!r} is not known: use {', '.join(FORMATS)}")
    if not (headers_only or is_local(model)):
        _refuse_unfetched(model, configs)
    return _fitted(model, configs, *_open(model, configs.run.trust_remote_code, headers_only))


def _refuse_unfetched(model: str | Path, configs: Configs) -> None:
    """What headers refuse, before hundreds of GB are fetched; where the hub gives none, as it does for what was fetched
    before and there is no network, the weights are waited for."""
    folder = hub_configuration(str(model), trust_remote_code=configs.run.trust_remote_code)
    try:
        tensors = hub_headers(str(model))
    except ModelError:
        return
    if tensors:
        _fitted(model, configs, folder, _headers(folder, tensors, configs.run.trust_remote_code))


def _fitted(model: str | Path, configs: Configs, folder: Path, source: Checkpoint | HeaderSource) -> Plan:
    """The plan, with options that fit the tensors of the model."""
    quant, method, run = configs.quant, configs.method, configs.run
    lazy = LazyModel.from_folder(folder, source, trust_remote_code=run.trust_remote_code)
    if apart := separate(lazy, source, partial(_is_included, quant)):
        source = source.split(apart)
        if isinstance(source, Checkpoint):
            source.config = untied_file(source.config)
        lazy = LazyModel.from_config(untied(lazy.model.config), source, trust_remote_code=run.trust_remote_code)
    if slices := lazy.split(partial(is_wanted, quant)):
        source = source.split(slices)
    selected = targets(lazy, quant)
    notes = (*_expansion(source), *_untied(apart, selected), *_renamed(lazy, slices), *_adapter(folder))
    if quant.group_size == AUTO:
        quant = replace(quant, group_size=auto_group_size(selected))
        notes += (f"group size {quant.group_size}: the largest of 128, 64, 32 that divides every layer's inputs",)
    check_group_size(selected, quant)
    lazy.included = selected.included
    if quant.avg_bits is not None:
        _check_average(quant, method, selected)
        choices = ", ".join(map(str, quant.bit_options))
        notes += (f"bits of each layer: chosen after the first pass, out of {choices}; {quant.avg_bits:g} on average",)
    FORMATS[quant.format].check(quant)
    _check_layers(FORMATS[quant.format], selected, quant)
    device = resolve_device(run.device)
    dtype = calibration_dtype(run.dtype, device, lazy.dtype)
    return Plan(
        str(model), folder, source, lazy, selected, quant, method, configs.calibration, run, device, dtype, notes
    )


def _check_layers(format: Format, chosen: Targets, quant: QuantConfig) -> None:
    """`CheckpointError` for the layers that the format cannot hold, with the pattern that leaves them all."""
    refused: dict[Target, CheckpointError] = {}
    for target in chosen.selected:
        try:
            if target.embedding:
                format.check_embedding(target.linear)
                format.check(quant.of(target.embedding))
            elif target.module in chosen.included:
                format.check_head(target.linear)
            format.check_layer(target.linear, target.shape, quant)
        except CheckpointError as error:
            refused[target] = error
    if refused:
        first = next(iter(refused.values()))
        them = "it" if len(refused) == 1 else f"all {len(refused)} of them"
        raise CheckpointError(f"{first}; --ignore '{pattern_of(refused)}' leaves {them}") from first


def _check_average(quant: QuantConfig, method: MethodConfig, chosen: Targets) -> None:
    """`ArgumentError` for an average that cannot be reached."""
    assert quant.avg_bits is not None
    if not method.calibrated:
        raise ArgumentError(
            f"avg_bits = {quant.avg_bits:g} needs losses measured on calibration data, which method {method.method} "
            "does not use: use another method"
        )
    least, most = average_range([target.shape for target in chosen.selected], quant)
    if not least <= quant.avg_bits <= most:
        raise ArgumentError(
            f"avg_bits = {quant.avg_bits:g} is out of range: with scales, {min(quant.bit_options)} to "
            f"{max(quant.bit_options)} bits take {least:.3f} to {most:.3f}"
        )


def _open(model: str | Path, trust_remote_code: bool, headers_only: bool) -> tuple[Path, Checkpoint | HeaderSource]:
    """A model's folder and its tensors, or only their names and shapes."""
    if headers_only and not is_local(model):
        folder = hub_configuration(str(model), trust_remote_code=trust_remote_code)
        try:
            tensors = hub_headers(str(model))
        except ModelError:
            if any(folder.glob("*.safetensors")):  # without a network, what was fetched before
                return folder, open_checkpoint(folder)
            raise
        return folder, _headers(folder, tensors, trust_remote_code)
    folder = locate(model, trust_remote_code=trust_remote_code)
    if headers_only and not has_weights(folder):
        return folder, header_source(folder, trust_remote_code=trust_remote_code)
    return folder, open_checkpoint(folder)


def _headers(folder: Path, tensors: Mapping[str, Header], trust_remote_code: bool) -> HeaderSource:
    """Names and shapes of a model's dense tensors, where its headers are all there is.

    Those of packed weights are numbers in tensors, so they are what the configuration says, as without headers.
    """
    config = read_json(folder / "config.json")
    quantization = quantization_of(config)
    if not tensors or (quantization and not is_low_precision(quantization)):
        return header_source(folder, trust_remote_code=trust_remote_code)
    return HeaderSource(dense_headers(tensors, config))


def _renamed(lazy: LazyModel, slices: Mapping[str, MatrixSlice]) -> tuple[str, ...]:
    """Notes where matrices are written that the model stores in another form."""
    first: dict[str, str] = {}
    for name, part in slices.items():
        if part.expert is None:
            kind = "are stored transposed" if part.transposed else "are stored in one tensor"
            first.setdefault(f"layers that {kind}", name)
        elif name not in lazy.own_names:
            first.setdefault("experts that are stored in one tensor", name)
    only = ": transformers loads them when sarqc is imported, and not without it"
    return tuple(
        f"{what} are written one by one, as {name.removesuffix('.weight')}{'' if name in lazy.own_names else only}"
        for what, name in first.items()
    )


def _is_included(quant: QuantConfig, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in quant.include) and is_wanted(quant, (name,))


def _untied(apart: Mapping[str, MatrixSlice], chosen: Targets) -> tuple[str, ...]:
    """A note where a head and an embedding are written apart that the model has as one."""
    if not apart:
        return ()
    dense = [linear for name in apart if (linear := name.removesuffix(".weight")) not in chosen.linears]
    also = f"; {dense[0]} stays in 16 bits: --include it too for a smaller checkpoint" if dense else ""
    return (f"{' and '.join(apart)} are one tensor of the model, and are written as two{also}",)


def _adapter(folder: Path) -> tuple[str, ...]:
    """A note where the folder also holds an adapter."""
    if not (folder / ADAPTER).exists():
        return ()
    return (f"{ADAPTER} lies beside the model: the adapter is left out; to have it in the result, merge it first",)


def _expansion(source: TensorSource) -> tuple[str, ...]:
    """A note where the source's weights are not stored as what they are calibrated with."""
    if not isinstance(source, Checkpoint):
        return ()
    if source.format is not None:
        return (
            f"the model is quantized already ({source.format.name}): its weights are expanded, rounded as they are",
        )
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in source.expanded.values()}
    return (f"weights in low precision are expanded to {', '.join(sorted(kinds))}",) if kinds else ()


def read_windows(plan: Plan) -> dataset.Windows | None:
    """The windows to calibrate on; None for a method that is not calibrated."""
    asked = plan.calibration
    if not plan.method.calibrated:
        return None
    tokenizer = partial(load_tokenizer, plan.folder, trust_remote_code=plan.run.trust_remote_code)
    drawn = windows(asked.dataset, tokenizer, plan.seqlen, column=asked.column)
    dataset.check_seqlen(drawn.tokens.shape[1], plan.lazy.text_config, plan.model, "sequence length")
    count = min(DEFAULT_SAMPLES, drawn.available) if asked.num_samples is None else asked.num_samples
    return drawn.draw(count, asked.seed)


def expected_windows(plan: Plan) -> tuple[int, int]:
    """Windows and tokens per window, counted where model and text are here, otherwise as the options say; (0, 0) for a
    method that is not calibrated."""
    asked = plan.calibration
    if not plan.method.calibrated:
        return 0, 0
    model_here = isinstance(plan.source, Checkpoint)  # and so its tokenizer
    if isinstance(asked.dataset, Tensor) or (model_here and counts_at_once(asked.dataset)):
        drawn = read_windows(plan)
        assert drawn is not None
        return len(drawn.tokens), drawn.tokens.shape[1]
    return asked.num_samples or DEFAULT_SAMPLES, plan.seqlen
