"""`from_pretrained` of transformers on a quantized checkpoint, with the weights packed: a quantizer of its kind.

transformers builds the model on meta, asks its quantizer what to change, loads what it finds names for, and asks again.
Here the first question puts packed modules in the places of quantized Linears and expert projections. They only
reserve their room, so that a device map counts their bytes. transformers then loads the rest as it always does. The
answer to the second fills each packed module from the files, one at a time, on the device that transformers chose for
it. Which checkpoint tensor belongs where is traced (weight_map.py), not known.

`save_pretrained` writes the packed tensors back in the format they came from, byte for byte.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight
from sarqc.model import moe
from sarqc.model.build import ModuleSlot, gather, module_slots
from sarqc.model.lazy_model import assemble
from sarqc.model.packed_linear import PackedWeight, QuantLinear
from sarqc.model.undeclared_experts import adopt
from sarqc.model.weight_map import TensorSlice, read_together, tied_to, trace

__all__ = ["PackedConfig", "PackedQuantizer"]

Packer = Callable[[QuantizedWeight], dict[str, Tensor]]

_INITIALIZED = "_is_hf_initialized"  # a module with this mark is not filled with random numbers by transformers


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers' bases are Any to mypy
    """The `quantization_config` of a checkpoint, word for word, for a model that keeps its weights packed."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.quant_method = values["quant_method"]

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return copy.deepcopy(self.values)


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]  # as above
    """Loads and saves a model with packed weights; see the file's first lines. For inference, as packed codes have no
    gradient."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._folder = Path()
        self._slots: list[ModuleSlot] = []
        self._dense: dict[str, tuple[TensorSlice, ...]] = {}
        self._packers: dict[str, Packer] = {}
        self._dtype = torch.float32

    def is_serializable(self) -> bool:
        """Codes come back out of any layout; what had to be expanded does not become codes again."""
        return not self._dense

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise ModelError("a packed model is loaded from files: give from_pretrained a folder or a hub id")
        self._folder, self._dtype = Path(files[0]).parent, model.dtype
        with torch.device("cpu"), open_checkpoint(self._folder) as source:  # transformers calls this under meta
            adopt(model)
            slices = trace(model, source)
            stored = set(source.linears())
            self._packers = {linear: source.packer(linear) for linear in stored}
            wanted = model.state_dict()
            self._reserve(model, slices, partial(_described, source, stored))
            self._hide_dense(model, slices, partial(read_together, model, source, wanted))
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                *(f"^{re.escape(parameter)}$" for parameter in self._dense),
                *(_ending(linear, name) for linear in stored for name in source.raw_members(linear)),
            }

    def _reserve(
        self, model: Any, slices: dict[str, tuple[TensorSlice, ...]], described: Callable[[str], QuantizedWeight | None]
    ) -> None:
        """Put packed modules where every matrix is quantized and alike."""
        for slot in module_slots(model, slices):
            weight = gather(slot.slices, described)
            if weight is None or tied_to(model, f"{slot.path}.weight") is not None:
                continue
            module = slot.put(weight, "meta", self._dtype)
            if not isinstance(module, QuantLinear):  # its owner would fill parameters that it no longer has
                setattr(slot.owner, _INITIALIZED, True)
            self._slots.append(slot)
        if any(moe.is_experts(slot.owner) for slot in self._slots):
            moe.use_sorted_experts(model)

    def _hide_dense(
        self,
        model: Any,
        slices: dict[str, tuple[TensorSlice, ...]],
        conversions: Callable[[], Iterable[frozenset[str]]],
    ) -> None:
        """Keep from transformers what it cannot make: parameters of packed tensors, or of a conversion that has one."""
        packed = {f"{linear}.weight" for linear in self._packers}
        taken = {stored.name for slot in self._slots for stored in slot.slices}
        incomplete = packed - taken
        if any(len(parts) > 1 and parts[0].name not in taken for parts in slices.values()):  # sorting names takes time
            incomplete = packed.union(*(names for names in conversions() if names & packed)) - taken
        for parameter, parts in slices.items():
            if incomplete.isdisjoint(stored.name for stored in parts):
                continue
            if tied_to(model, parameter) is not None:
                raise ModelError(f"{parameter!r} is quantized and tied to another parameter; such models are not run")
            self._dense[parameter] = parts
            _hide(model, parameter)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with open_checkpoint(self._folder) as source:
            for slot in self._slots:
                weight = gather(slot.slices, source.quantized)
                module = _packed(model, slot)
                assert weight is not None
                module.fill(weight, module.words.device, self._dtype)
            for parameter, slices in self._dense.items():
                _show(model, parameter, partial(assemble, slices, source))
        for parameter in model.parameters():  # transformers 5.15 leaves those that it renames in their stored dtype
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.to(self._dtype)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The dense tensors by the model's names and the packed ones by the checkpoint's, as it stores them."""
        state: dict[str, Tensor] = dict(model.state_dict())
        for slot in self._slots:
            weight = _packed(model, slot).codes()
            for stored in slot.slices:
                assert stored.linear is not None
                state |= self._packers[stored.linear](_part(weight, stored))
        return state, {}


def _hide(model: nn.Module, parameter: str) -> None:
    """Keep a parameter, on meta, from transformers, which has no rule to load it; a buffer reserves its room."""
    path, _, leaf = parameter.rpartition(".")
    owner, there = model.get_submodule(path), model.get_parameter(parameter)
    delattr(owner, leaf)
    owner.register_buffer(leaf, there.detach(), persistent=False)
    setattr(owner, _INITIALIZED, True)


def _show(model: nn.Module, parameter: str, made: Callable[..., Tensor]) -> None:
    """The parameter again, made(shape, device, dtype) by us."""
    path, _, leaf = parameter.rpartition(".")
    owner, there = model.get_submodule(path), model.get_buffer(parameter)
    delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(made(there.shape, there.device, there.dtype), requires_grad=False))


def _packed(model: nn.Module, slot: ModuleSlot) -> PackedWeight:
    module = model.get_submodule(slot.path)
    assert isinstance(module, PackedWeight)
    return module


def _part(weight: QuantizedWeight, stored: TensorSlice) -> QuantizedWeight:
    """The matrix of a stack that a checkpoint tensor is."""
    if stored.expert is None:
        return weight
    rows = slice(stored.start, stored.start + stored.rows)
    one = weight.expert(stored.expert)
    return QuantizedWeight(one.codes[:, rows], one.scales[:, rows], one.zeros[:, rows], one.bits)


def _described(source: Checkpoint, stored: set[str], linear: str) -> QuantizedWeight | None:
    """A quantized weight of the right shapes on meta; None where the source has it dense."""
    if linear not in stored:
        return None
    info = source.describe(linear)
    grid = (1, info.shape[0], info.groups)
    return QuantizedWeight(
        codes=torch.empty((1, *info.shape), dtype=torch.uint8, device="meta"),
        scales=torch.empty(grid, dtype=info.dtype, device="meta"),
        zeros=torch.empty(grid, dtype=torch.uint8, device="meta"),
        bits=info.bits,
    )


def _ending(linear: str, name: str) -> str:
    """A pattern for the names that transformers, which takes them for tensors without a use, gives packed tensors.

    Its rules for experts rename "P.weight_packed" as if it were "P.weight", to "Q_packed".
    """
    return f"{name.removeprefix(linear + '.').removeprefix('weight')}$"
