"""A model whose weights are elsewhere: built on the meta device, filled and emptied one decoder block at a time.

Nothing here knows an architecture. The decoder blocks are the one list of modules as long as the configuration says.
What each of them is called with (masks, rotary tables, a layer's own kind of attention) is learned by running the
body once with every block replaced by a recorder that passes its input on; the same trick, with the last recorder
handing out a tensor of ours, runs whatever comes after the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sarqc.errors import ModelError, SarqcError, first_line, out_of_memory
from sarqc.model import moe
from sarqc.model.architecture import build_on_meta, find_blocks, language_model, read_config
from sarqc.model.checks import check_layers
from sarqc.model.source import TensorSource
from sarqc.model.tokenizer import check_tokens
from sarqc.model.usage import Usage, usage
from sarqc.model.weight_map import Piece, trace
from sarqc.system import warm_up_mkl

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Skeleton:
    """A causal language model on meta, with the names of the checkpoint tensors its parameters are made of.

    model: the transformers model, in eval mode; non-persistent buffers (rotary tables, scales) are real. blocks: its
    decoder blocks. prefix: their name in the model ("model.layers"). pieces: checkpoint tensors of each parameter.
    unused: matrices of the checkpoint that transformers makes nothing of, without ".weight" (layers that servers
    draft tokens with). dtype: what parameters become unless transformers keeps them in fp32. device: where the outer
    parameters are.
    """

    def __init__(self, config: PreTrainedConfig, source: TensorSource, trust_remote_code: bool) -> None:
        warm_up_mkl()
        self.dtype: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
        check_layers(config, len(source.names()))
        self._build = partial(build_on_meta, config, trust_remote_code)
        self.model = model = self._build(self.dtype)
        self.device = torch.device("cpu")
        moe.use_sorted_experts(model)
        self.prefix, self._layers = find_blocks(model, lambda: self.usage)
        self.blocks: list[nn.Module] = list(self._layers)
        self.pieces: dict[str, tuple[Piece, ...]] = trace(model, source)
        used = {piece.name for pieces in self.pieces.values() for piece in pieces}
        self.unused = _unused(source, used | set(model.all_tied_weights_keys))
        self._calls: dict[tuple[int, int], list[Call]] = {}

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, source: TensorSource, *, trust_remote_code: bool = False
    ) -> Skeleton:
        """Build from a configuration (copied); `source` is only asked for names and shapes.

        Raises `ModelError` where this is no language model with a decoder alone, or the names do not fit it.
        """
        return cls(language_model(config), source, trust_remote_code)

    @classmethod
    def from_folder(cls, folder: str | Path, source: TensorSource, *, trust_remote_code: bool = False) -> Skeleton:
        """Build from the folder that holds config.json; otherwise as `from_config`."""
        config = read_config(folder, trust_remote_code)
        return cls.from_config(config, source, trust_remote_code=trust_remote_code)

    def use_dtype(self, dtype: torch.dtype) -> None:
        """Run in `dtype` instead of the checkpoint's; buffers become what a model built in it has.

        Loading with a dtype does this by itself. It belongs before the first `prepare`: what was recorded is dropped.
        """
        if dtype == self.dtype:
            return
        for path, module in self._build(dtype).named_modules():
            for name in module._non_persistent_buffers_set:
                self.model.get_submodule(path)._buffers[name] = module._buffers[name].to(self.device)
        self.model.config.dtype = dtype
        self.dtype = dtype
        self._calls.clear()

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the text decoder; the whole of it for a text model."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def usage(self) -> Usage | None:
        """What each weight is used for; None where the model's code does not run without data."""
        model = self.model
        if not all(parameter.is_meta for parameter in model.parameters()):
            model = self._build(self.dtype)
            moe.use_sorted_experts(model)
        return usage(model)

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
        for parameter in self._outer():
            if head or self._is_body(parameter):
                self._load(parameter, source, self.device)
        for target, origin in self.model.all_tied_weights_keys.items():
            if target not in self.pieces:
                _assign(self.model, target, self.model.get_parameter(origin))
            elif origin not in self.pieces:
                self._load(target, source, self.device)
                _assign(self.model, origin, self.model.get_parameter(target))
        self._move_buffers(self.model, self.device, skip=f"{self.prefix}.")

    def unload_outer(self) -> None:
        """Give back the memory of what `load_outer` loaded; recorded calls stay usable."""
        for parameter in {*self._outer(), *self.model.all_tied_weights_keys}:
            self._empty(parameter)

    def load_block(
        self, index: int, source: TensorSource, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Load block `index` alone; its tensors are read one at a time, so the peak is the block and one tensor."""
        self.use_dtype(dtype or self.dtype)
        for parameter in self.parameters(index):
            self._load(parameter, source, torch.device(device))
        self._move_buffers(self.blocks[index], torch.device(device))

    def unload_block(self, index: int) -> None:
        """Send the block's stored tensors back to meta."""
        for parameter in self.parameters(index):
            self._empty(parameter)

    def parameters(self, index: int) -> list[str]:
        """Full names of the stored parameters and buffers of block `index` that the model has at the moment."""
        start = f"{self.prefix}.{index}."
        present = self.blocks[index].state_dict().keys()
        return [name for name in self.pieces if name.startswith(start) and name.removeprefix(start) in present]

    # -- running ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, L, H] entering block 0, for tokens int64 [B, L]; needs `load_outer`."""
        check_tokens(tokens, self.model)
        self.prepare(*tokens.shape)
        return self._record(tokens)[0].hidden

    @torch.no_grad()
    def prepare(self, batch: int, length: int) -> None:
        """Record what every block is called with for this shape; later calls of the shape need no outer weights.

        Raises `ModelError` where that depends on the tokens, because blocks could then not be replayed one by one.
        """
        if (batch, length) in self._calls:
            return
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
        calls = [recorder.call for recorder in self._record(tokens)]
        others = [recorder.call for recorder in self._record(tokens + 1)]
        for index, (call, other) in enumerate(zip(calls, others)):
            if not _same(call, other):
                raise ModelError(
                    f"block {self.prefix}.{index} is given more than hidden states that depend on the tokens; "
                    "such a model cannot be run block by block"
                )
        self._calls[batch, length] = calls

    @torch.no_grad()
    def call_block(self, index: int, hidden: Tensor) -> Tensor:
        """Run block `index` on hidden states [B, L, H] with its own arguments and no cache.

        `ModelError` where the model's own code fails on what its configuration says.
        """
        self.prepare(hidden.shape[0], hidden.shape[1])
        args, kwargs = self._calls[hidden.shape[0], hidden.shape[1]][index]
        try:
            out = self.blocks[index](hidden, *args, **kwargs)
        except (SarqcError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise torch.OutOfMemoryError(first_line(error)) from error
            raise ModelError(
                f"block {self.prefix}.{index} does not run as config.json says: {first_line(error)}"
            ) from error
        leaving: Tensor = out[0] if isinstance(out, tuple) else out
        return leaving

    @torch.no_grad()
    def finish(self, hidden: Tensor) -> Tensor:
        """Logits [B, L, V] from what leaves the last block; needs `load_outer(..., head=True)`."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        logits: list[Tensor] = []
        self._through(lambda: logits.append(self.model(input_ids=tokens, use_cache=False).logits), hidden)
        return logits[0]

    # -- inside -------------------------------------------------------------------------------------------------

    def _record(self, tokens: Tensor) -> list[_Recorder]:
        body = self.model.base_model
        return self._through(lambda: body(input_ids=tokens.to(self.device), use_cache=False), None)

    def _through(self, run: Callable[[], Any], leaving: Tensor | None) -> list[_Recorder]:
        """Call `run` with recorders in the blocks' places; the last passes `leaving` on where that is given."""
        recorders = [_Recorder(block) for block in self.blocks]
        recorders[-1].leaving = leaving
        try:
            for index, recorder in enumerate(recorders):
                self._layers[index] = recorder
            run()
        finally:
            for index, block in enumerate(self.blocks):
                self._layers[index] = block
        return recorders

    def _is_body(self, parameter: str) -> bool:
        """Whether text needs this parameter before or between the blocks, or behind them for the last norm."""
        if self.usage is not None and parameter not in self.usage.touched:
            return False  # a tower
        head = self.model.get_output_embeddings()
        return head is None or all(tensor is not self._tensor(parameter) for tensor in head.parameters())

    def _tensor(self, parameter: str) -> Tensor:
        return _find(self.model, parameter)

    def _outer(self) -> list[str]:
        return [name for name in self.pieces if not name.startswith(f"{self.prefix}.")]

    def _load(self, parameter: str, source: TensorSource, device: torch.device) -> None:
        like = _find(self.model, parameter)
        kept = self._kept_dtype(parameter, like)
        _assign(self.model, parameter, assemble(self.pieces[parameter], source, like.shape, device, kept))

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
        tensor = _find(self.model, parameter)
        _assign(self.model, parameter, torch.empty_like(tensor, device="meta"))

    def _move_buffers(self, root: nn.Module, device: torch.device, skip: str | None = None) -> None:
        for path, module in root.named_modules():
            if skip and path.startswith(skip):
                continue
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    module._buffers[name] = buffer.to(device)


def assemble(
    pieces: Sequence[Piece],
    source: TensorSource,
    shape: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """A parameter of this shape out of its checkpoint tensors, which are read one at a time."""
    if (made := pieces[0].conversion) is not None:
        return made.run(source.load).to(device, dtype).contiguous()
    if pieces[0].expert is None:
        return source.load(pieces[0].name).to(device, dtype)
    filled = torch.empty(tuple(shape), dtype=dtype, device=device)
    whole = filled.view(-1, *shape[-2:])  # a Linear is a stack of one
    for piece in pieces:
        whole[piece.expert, piece.start : piece.start + piece.rows].copy_(source.load(piece.name))
    return filled


class _Recorder(nn.Module):
    """Stands in a block's place: keeps what it is called with and passes its input on.

    Every other attribute is the block's own, because bodies ask their blocks for things ("attention_type").
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # past nn.Module, which would register it as a child
        self.leaving: Tensor | None = None
        self.hidden = torch.empty(0)
        self.call: Call = ((), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            self.hidden, args = args[0], args[1:]
        else:
            self.hidden = kwargs.pop("hidden_states")
        self.call = (args, kwargs)
        return self.hidden if self.leaving is None else self.leaving


def _unused(source: TensorSource, used: set[str]) -> tuple[str, ...]:
    names = (name for name in source.names() if name.endswith(".weight") and name not in used)
    return tuple(name.removesuffix(".weight") for name in names if len(source.shape(name)) == 2)


def _find(model: Any, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _assign(model: Any, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        own = isinstance(tensor, nn.Parameter)
        module._parameters[leaf] = tensor if own else nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded arguments are equal; things that are neither tensors nor containers count by type."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return type(a) is type(b)
