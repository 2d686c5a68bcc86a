"""A model whose weights are elsewhere: built on the meta device, filled and emptied one decoder block at a time.

Nothing here knows an architecture. The decoder blocks are the one list of modules as long as the configuration says.
What they are called with is the model's own business: it is run as it is (`sarqc.pipeline.forward`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sarqc.conventions import MatrixSlice
from sarqc.model import moe, other_forms
from sarqc.model.architecture import build_on_meta, find_blocks, language_model, read_config
from sarqc.model.checks import check_layers
from sarqc.model.expert_names import AllExperts, single_experts
from sarqc.model.other_forms import Wanted
from sarqc.model.source import TensorSource
from sarqc.model.undeclared_experts import adopt
from sarqc.model.usage import Usage, usage
from sarqc.model.weight_map import TensorSlice, own_names, slices_of, tensors_of_experts, trace
from sarqc.system import warm_up_mkl


class LazyModel:
    """A causal language model on meta, with the names of the checkpoint tensors its parameters are made of.

    model: the transformers model, in eval mode; non-persistent buffers (rotary tables, scales) are real. blocks: its
    decoder blocks. layers: the list of them that the model holds. prefix: that list's name in the model
    ("model.layers"). included: full names of what is quantized too outside the blocks: Linears behind them in the order
    in which text passes them, then embeddings; each is a unit as a block is. slices: checkpoint tensors of each
    parameter. unused: matrices of the checkpoint that transformers makes nothing of, without ".weight" (layers that
    servers draft tokens with). dtype: what parameters become unless transformers keeps them in fp32. device: where the
    outer parameters are.
    """

    def __init__(self, config: PreTrainedConfig, source: TensorSource, trust_remote_code: bool) -> None:
        warm_up_mkl()
        self.dtype: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
        check_layers(config, len(source.names()))
        self._build = partial(build_on_meta, config, trust_remote_code)
        self.model = model = self._build(self.dtype)
        self.device = torch.device("cpu")
        adopt(model)
        moe.use_sorted_experts(model)
        self.prefix, self.layers = find_blocks(model, lambda: self.usage)
        self.blocks: list[nn.Module] = list(self.layers)
        self.included: tuple[str, ...] = ()
        self.slices: dict[str, tuple[TensorSlice, ...]] = trace(model, source)
        used = {stored.name for slices in self.slices.values() for stored in slices}
        self.unused = _unused(source, used | set(model.all_tied_weights_keys))
        self.own_names: set[str] = set()  # of those that `split` gives, what transformers reads too

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, source: TensorSource, *, trust_remote_code: bool = False
    ) -> LazyModel:
        """Build from a configuration (copied); only names and shapes of `source` are read.

        Raises `ModelError` where this is no language model with a decoder alone, or the names do not fit it.
        """
        return cls(language_model(config), source, trust_remote_code)

    @classmethod
    def from_folder(cls, folder: str | Path, source: TensorSource, *, trust_remote_code: bool = False) -> LazyModel:
        """Build from the folder that holds config.json; otherwise as `from_config`."""
        config = read_config(folder, trust_remote_code)
        return cls.from_config(config, source, trust_remote_code=trust_remote_code)

    def use_dtype(self, dtype: torch.dtype) -> None:
        """Run in `dtype` instead of the checkpoint's; buffers become what a model built in it has.

        Loading with a dtype does this by itself.
        """
        if dtype == self.dtype:
            return
        for path, module in self._build(dtype).named_modules():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    self.model.get_submodule(path)._buffers[name] = buffer.to(self.device)
        self.model.config.dtype = dtype
        self.dtype = dtype

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the text decoder; the whole of it for a text model."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state; those of an embedding where the configuration does not say."""
        size = getattr(self.text_config, "hidden_size", None)
        return int(size or self.model.get_input_embeddings().weight.shape[1])

    @property
    def units(self) -> list[nn.Module]:
        """What is loaded and quantized one after the other: the decoder blocks, then `included`."""
        return [*self.blocks, *map(self.model.get_submodule, self.included)]

    @property
    def passed(self) -> int:
        """How many units text passes, one after the other: all but the embeddings, which are the last ones."""
        return sum(not isinstance(unit, nn.Embedding) for unit in self.units)

    def unit_name(self, index: int) -> str:
        """Full name of a unit."""
        count = len(self.blocks)
        return f"{self.prefix}.{index}" if index < count else self.included[index - count]

    def split(self, wanted: Wanted) -> dict[str, MatrixSlice]:
        """Take apart what the checkpoint stores in other forms than Linears'; where each matrix lies, by its own name.

        The source has to give the matrices by these names from now on. wanted: whether the layer of these two
        names is to be quantized; what has none stays as it is. It belongs before anything is loaded.
        """
        slices = self._split_experts(wanted)
        inside = f"{self.prefix}."
        modules = ((path, module) for path, module in self.model.named_modules() if path.startswith(inside))
        linears = [f"{path}.weight" for path, module in modules if isinstance(module, nn.Linear)]
        for parameter, (name, part) in other_forms.cut(self.model, linears, self.slices, wanted).items():
            self.slices[parameter] = (TensorSlice(name, None, 0, 0),)
            self.own_names.add(name)
            slices[name] = part
        if turned := other_forms.turn(self.model, inside, self.slices, wanted):
            self.__dict__.pop("usage", None)  # it knows no Linears there
        return slices | turned

    def _split_experts(self, wanted: Wanted) -> dict[str, MatrixSlice]:
        slices: dict[str, MatrixSlice] = {}
        for path, module in self.model.named_modules():
            if not path.startswith(f"{self.prefix}.") or not moe.is_experts(module):
                continue
            parameters = [f"{path}.{projection}" for projection in moe.projections(module)]
            stored = {p: tensors_of_experts(self.slices[p]) for p in parameters}
            parts = {p: self._single(p, tensors) for p, tensors in stored.items() if tensors}
            if len(parts) < len(parameters) or not all(parts.values()):
                continue
            if any(wanted((name.removesuffix(".weight"), p)) for p, single in parts.items() for name in single):
                for parameter, single in parts.items():
                    self.slices[parameter] = slices_of(single)
                    slices |= single
                moe.separate_projections(module)
        return slices

    def _single(self, parameter: str, stored: AllExperts) -> dict[str, MatrixSlice]:
        single = single_experts(self.model, parameter, stored)
        own = own_names(self.model, parameter)
        if own is None or len(own) != len(single):
            return single
        at = {(stored.expert, stored.start): name for stored, name in zip(slices_of(single), single)}
        self.own_names |= {stored.name for stored in own}
        return {stored.name: single[at[stored.expert, stored.start]] for stored in own}

    @cached_property
    def usage(self) -> Usage | None:
        """What each weight is used for; None where the model's code does not run without data."""
        model = self.model
        if not all(parameter.is_meta for parameter in model.parameters()):
            model = self._build(self.dtype)
            adopt(model)
            moe.use_sorted_experts(model)
        return usage(model)

    @cached_property
    def skipped(self) -> frozenset[int]:
        """Blocks that text does not pass through, such as those that attend to images; none where that is unknown."""
        if (seen := self.usage) is None:
            return frozenset()
        passed = {id(parameter) for name, parameter in self.model.named_parameters() if name in seen.touched}
        own = [{id(parameter) for parameter in block.parameters()} for block in self.blocks]
        return frozenset(index for index, mine in enumerate(own) if mine and not mine & passed)

    # -- weights ------------------------------------------------------------------------------------------------

    def load_outer(
        self,
        source: TensorSource,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        head: bool = False,
    ) -> None:
        """Load what stands outside the blocks: embeddings and norms, with `head` also what turns hidden into logits."""
        self.use_dtype(dtype or self.dtype)
        self.device = torch.device(device)
        asked = {_first_parameter(path, module) for path, module in self.model.named_modules()}
        for parameter in self._outer():
            if head or parameter in asked or self._is_body(parameter):
                self._load(parameter, source, self.device)
        for target, origin in self.model.all_tied_weights_keys.items():
            if target not in self.slices:
                _assign(self.model, target, self.model.get_parameter(origin))
            elif origin not in self.slices:
                self._load(target, source, self.device)
                _assign(self.model, origin, self.model.get_parameter(target))
        for index in range(len(self.blocks), self.passed):
            for parameter in self.parameters(index):  # some models cast what they hand to a head to its dtype
                if (like := self.model.get_parameter_or_buffer(parameter)).is_meta:
                    kept = self._kept_dtype(parameter, like)
                    _assign(self.model, parameter, torch.empty_like(like, dtype=kept))
        self._move_buffers(self.model, self.device, skip=f"{self.prefix}.")

    def unload_outer(self) -> None:
        """Give back the memory of what `load_outer` loaded."""
        for parameter in {*self._outer(), *self.model.all_tied_weights_keys}:
            self._empty(parameter)

    def unload_embeddings(self) -> None:
        """Give back the memory of embeddings and of what is tied to them; what else stands outside the blocks (norms,
        small projections) stays, because a model may use it between two blocks."""
        for parameter in {*self._outer(), *self.model.all_tied_weights_keys}:
            module = self.model.get_submodule(parameter.rpartition(".")[0])
            if isinstance(module, nn.Embedding) or parameter in self.model.all_tied_weights_keys:
                self._empty(parameter)

    def load_block(
        self, index: int, source: TensorSource, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Load unit `index` alone; its tensors are read one at a time, so the peak is the block and one tensor."""
        self.use_dtype(dtype or self.dtype)
        for parameter in self._loaded(index):
            self._load(parameter, source, torch.device(device))
        self._move_buffers(self.units[index], torch.device(device))

    def unload_block(self, index: int) -> None:
        """Send the unit's tensors back to meta."""
        for parameter in self._loaded(index):
            self._empty(parameter)

    def tensors(self, index: int) -> list[str]:
        """Names of the checkpoint tensors that `load_block` reads, each once."""
        loaded = self._loaded(index)
        return list(dict.fromkeys(stored.name for parameter in loaded for stored in self._stored(parameter)))

    def parameters(self, index: int) -> list[str]:
        """Full names of the stored parameters and buffers of unit `index` that the model has at the moment."""
        start = f"{self.unit_name(index)}."
        present = self.units[index].state_dict().keys()
        return [name for name in self.slices if name.startswith(start) and name.removeprefix(start) in present]

    # -- inside -------------------------------------------------------------------------------------------------

    def _is_body(self, parameter: str) -> bool:
        """Whether text needs this parameter before or between the blocks, or behind them for the last norm."""
        if self.usage is not None and parameter not in self.usage.touched:
            return False  # a tower
        head, own = self.model.get_output_embeddings(), self.model.get_parameter_or_buffer(parameter)
        return head is None or all(tensor is not own for tensor in head.parameters())

    def _loaded(self, index: int) -> list[str]:
        """The parameters of a unit, and those that the checkpoint stores as another block's; each block has them in
        memory of its own."""
        start, inside = f"{self.unit_name(index)}.", f"{self.prefix}."
        tied: dict[str, str] = self.model.all_tied_weights_keys
        mine = (name for name, origin in tied.items() if name.startswith(start) and origin.startswith(inside))
        return [*self.parameters(index), *(name for name in mine if name not in self.slices)]

    def _stored(self, parameter: str) -> tuple[TensorSlice, ...]:
        return self.slices.get(parameter) or self.slices[self.model.all_tied_weights_keys[parameter]]

    def _outer(self) -> list[str]:
        present = self.model.state_dict().keys()  # what is packed is none of them
        return [name for name in self.slices if not name.startswith(f"{self.prefix}.") and name in present]

    def _load(self, parameter: str, source: TensorSource, device: torch.device) -> None:
        like = self.model.get_parameter_or_buffer(parameter)
        kept = self._kept_dtype(parameter, like)
        _assign(self.model, parameter, assemble(self._stored(parameter), source, like.shape, device, kept))

    def _kept_dtype(self, parameter: str, like: Tensor) -> torch.dtype:
        """The dtype a tensor is loaded in: transformers names some that stay fp32 in a half-precision model."""
        if not like.is_floating_point():
            return like.dtype
        return torch.float32 if self.stays_in_fp32(parameter) else self.dtype

    def stays_in_fp32(self, parameter: str) -> bool:
        """Whether transformers keeps this parameter in fp32 in a half-precision model of this dtype."""
        strict = self.model._keep_in_fp32_modules_strict or ()
        loose = self.model._keep_in_fp32_modules or ()
        names = {torch.bfloat16: tuple(strict), torch.float16: (*strict, *loose)}.get(self.dtype, ())
        return any(re.search(name.replace("*", ".*"), parameter) for name in names)

    def _empty(self, parameter: str) -> None:
        tensor = self.model.get_parameter_or_buffer(parameter)
        _assign(self.model, parameter, torch.empty_like(tensor, device="meta"))

    def _move_buffers(self, root: nn.Module, device: torch.device, skip: str | None = None) -> None:
        for path, module in root.named_modules():
            if skip and path.startswith(skip):
                continue
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    module._buffers[name] = buffer.to(device)


def assemble(
    slices: Sequence[TensorSlice],
    source: TensorSource,
    shape: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """A parameter of this shape out of its checkpoint tensors, which are read one at a time."""
    if (made := slices[0].conversion) is not None:
        return made.run(source.load).to(device, dtype).contiguous()
    if slices[0].expert is None:
        return source.load(slices[0].name).to(device, dtype)
    filled = torch.empty(tuple(shape), dtype=dtype, device=device)
    whole = filled.view(-1, *shape[-2:])  # a Linear is a stack of one
    for stored in slices:
        stored.of(whole).copy_(source.load(stored.name))
    return filled


def _unused(source: TensorSource, used: set[str]) -> tuple[str, ...]:
    names = (name for name in source.names() if name.endswith(".weight") and name not in used)
    return tuple(name.removesuffix(".weight") for name in names if len(source.shape(name)) == 2)


def _first_parameter(path: str, module: nn.Module) -> str:
    """The parameter whose device transformers takes for that of a model; "" for a module that is none."""
    first = next(module.named_parameters(), None) if isinstance(module, PreTrainedModel) else None
    return "" if first is None else f"{path}.{first[0]}".removeprefix(".")


def _assign(model: Any, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        own = isinstance(tensor, nn.Parameter)
        module._parameters[leaf] = tensor if own else nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
