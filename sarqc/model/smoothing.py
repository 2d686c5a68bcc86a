"""Find smoothing mappings: where channel scales can go so that the model computes the same. Found by tests, not by
name.

Scaling the inputs of a site by s is free where the layer that makes that tensor can be divided by s. That smooth layer
is

- a norm (`y = n * (w + c) + b`, with c = 0, or 1 where weights are stored around zero): all layers that read its
  output, routers and shared experts included, take the same s;
- rows of a Linear, or of an experts' stack, that pass straight through to the inputs: v_proj through the attention to
  o_proj, up_proj through the product with the gate to down_proj. Several inputs may follow one row, as with grouped
  heads.

One short forward shows which modules read the output of a norm: they received its storage. Which row an input follows
is found by scaling the rows by powers of two that encode their index, three bits at a time, and decoding the inputs.
Finally every mapping is tested with random powers of two, exact in any floating dtype: applied to the smooth layer
alone they must change the output of the block, applied to the balance layers too they must not. What fails stays
unscaled, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sarqc.model import moe
from sarqc.model.lazy_model import LazyModel
from sarqc.model.sites import Site, observe, stack

DIGIT = 8
"""Row indices are encoded in this base: powers of two from 1/16 to 8, which fp16 holds as well."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""Change of a block's output, relative to that of half a fold, up to which a fold is right. Most change nothing at all;
into weights stored around zero a fold rounds once."""


@dataclass(frozen=True)
class SmoothingMapping:
    """Inputs of `sites` times s, the smooth layer divided by it.

    Attributes:
        sites: Sites whose inputs are scaled.
        balance_layers: Every parameter [.., rows, K] whose columns take s, those of the sites included.
        smooth_layer: The norm's weight, or the matrix or stack whose rows start .. start + channels make the inputs.
        bias: Its bias, or None.
        start: First row.
        channels: Number of rows.
        source: The channel behind each input, int64 [K], or None where input j is channel j.
        offset: c of a norm.
        experts: Number of experts with scales of their own; 1 where all share them.
    """

    sites: tuple[Site, ...]
    balance_layers: tuple[str, ...]
    smooth_layer: str
    bias: str | None
    start: int
    channels: int
    source: Tensor | None
    offset: float
    experts: int

    def inputs(self, scales: Tensor) -> Tensor:
        """The scale of each input, [E, K], for scales [E, channels]."""
        return scales if self.source is None else scales[:, self.source]


@torch.no_grad()
def find_mappings(
    lazy: LazyModel, index: int, sites: Sequence[Site], run: Callable[[], Tensor]
) -> tuple[list[SmoothingMapping], dict[str, str]]:
    """The mappings of block `index`, which is loaded, tested by running it; and the reason of each site without one.

    run: calls the block on a few tokens and returns what leaves it.
    """
    traced = _trace(lazy, index, run)
    mappings: list[SmoothingMapping] = []
    reasons: dict[str, str] = {}
    by_norm: dict[str, list[Site]] = {}
    for site in sites:
        norm = traced.norm_behind(lazy.model, site)
        if norm is not None:
            by_norm.setdefault(norm, []).append(site)
        elif (mapping := _linear_mapping(lazy, site, traced, run)) is not None:
            mappings.append(mapping)
        else:
            reasons[site.name] = "no layer was found that makes its inputs and can be divided by scales"
    mappings += [_norm_mapping(lazy.model, norm, members, traced) for norm, members in by_norm.items()]
    expected, proved = run(), []
    for mapping in mappings:
        reason = _unsupported_reason(lazy.model, mapping, run, expected)
        if reason is None:
            proved.append(mapping)
        else:
            reasons |= {site.name: reason for site in mapping.sites}
    return proved, reasons


# -- seeing -------------------------------------------------------------------------------------------------------


@dataclass
class _Traced:
    """What one forward showed. inputs: the first inputs of modules with parameters of their own, in the order of the
    calls. norms: modules that could be norms, with their outputs. All tensors are kept, so storages stay distinct."""

    inputs: dict[str, Tensor]
    norms: dict[str, Tensor]

    def balance_layers(self, model: Any, norm: str) -> list[str]:
        """Parameters with a column for each channel of a norm's output, in modules that read it."""
        out = self.norms[norm]
        layers = []
        for name, x in self.inputs.items():
            if name != norm and _same_storage(x, out):
                module = model.get_submodule(name)
                own = moe.projections(module)[:1] if moe.is_experts(module) else _matrices(module)
                layers += [f"{name}.{p}" for p in own if getattr(module, p).shape[-1] == out.shape[-1]]
        return layers

    def norm_behind(self, model: Any, site: Site) -> str | None:
        """The norm whose output a site reads."""
        first = site.members[0]
        if _is_second_projection(model, site):
            return None
        x = self.inputs[first.module]
        return next((name for name, out in self.norms.items() if _same_storage(x, out)), None)


def _trace(lazy: LazyModel, index: int, run: Callable[[], Tensor]) -> _Traced:
    traced = _Traced({}, {})

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            traced.inputs.setdefault(name, x)

    def after(name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor) and name in traced.inputs and out.shape == traced.inputs[name].shape:
            traced.norms.setdefault(name, out)

    with ExitStack() as hooks:
        for path, module in lazy.blocks[index].named_modules():
            name = f"{lazy.prefix}.{index}.{path}"
            own = dict(module.named_parameters(recurse=False))
            if own:
                hooks.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            if own.keys() in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in own.values()):
                hooks.enter_context(module.register_forward_hook(partial(after, name)))
        run()
    return traced


def _same_storage(a: Tensor, b: Tensor) -> bool:
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return same and a.shape[-1] == b.shape[-1] and a.numel() == b.numel()


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 2]


def _is_second_projection(model: Any, site: Site) -> bool:
    first = site.members[0]
    module = model.get_submodule(first.module)
    return moe.is_experts(module) and first.parameter.endswith(f".{moe.projections(module)[1]}")


# -- proposing ----------------------------------------------------------------------------------------------------


def _norm_mapping(model: Any, norm: str, sites: Sequence[Site], traced: _Traced) -> SmoothingMapping:
    module = model.get_submodule(norm)
    return SmoothingMapping(
        sites=tuple(sites),
        balance_layers=tuple(traced.balance_layers(model, norm)),
        smooth_layer=f"{norm}.weight",
        bias=f"{norm}.bias" if getattr(module, "bias", None) is not None else None,
        start=0,
        channels=len(module.weight),
        source=None,
        offset=_offset(module, traced.inputs[norm]),
        experts=1,
    )


def _offset(module: Any, x: Tensor) -> float:
    """c of a norm n * (w + c) + b, from its outputs for w = 0 and w = 1 without bias; a wrong one will not pass."""

    def output(value: float) -> Tensor:
        own = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
        own["weight"] += value
        out: Tensor = torch.func.functional_call(module, own, (x,))
        return out.float()

    none, one = output(0.0), output(1.0)
    unit = one - none
    return float(((none * unit).sum() / unit.square().sum().clamp(min=torch.finfo(torch.float32).tiny)).round())


def _linear_mapping(lazy: LazyModel, site: Site, traced: _Traced, run: Callable[[], Tensor]) -> SmoothingMapping | None:
    """A fold into rows of the Linear called last before the site whose rows its inputs follow, or into its stack's."""
    model, first = lazy.model, site.members[0]
    if _is_second_projection(model, site):
        name = first.module
        candidates = [(name, moe.projections(model.get_submodule(name))[0])]
    else:
        called = list(traced.inputs)
        before = called[: called.index(first.module)]
        candidates = [(name, "weight") for name in reversed(before) if isinstance(model.get_submodule(name), nn.Linear)]
    for name, leaf in candidates:
        smooth_layer = f"{name}.{leaf}"
        bias = f"{name}.bias" if getattr(model.get_submodule(name), "bias", None) is not None else None
        rows = stack(model, smooth_layer).shape[1]
        # All rows; the second of two stacked parts; what is left of q, k and v in one when q has as many as we read.
        for channels in dict.fromkeys((rows, rows // 2, (rows - site.in_features) // 2)):
            if channels < 1 or site.in_features % channels:
                continue
            mapping = SmoothingMapping(
                (site,), tuple(dict.fromkeys(t.parameter for t in site.members)),
                smooth_layer, bias, rows - channels, channels, None, 0.0, len(stack(model, smooth_layer)),
            )  # fmt: skip
            source = _source_channels(lazy, mapping, run)
            if source is not None:
                identity = torch.equal(source, torch.arange(channels, device=source.device))
                return replace(mapping, source=None if identity else source)
    return None


def _source_channels(lazy: LazyModel, mapping: SmoothingMapping, run: Callable[[], Tensor]) -> Tensor | None:
    """The giver's row behind each input of the fold's one site, int64 [K]; None where that is no plain scaling."""
    site = mapping.sites[0]

    def inputs() -> Tensor:
        seen: list[Tensor] = []
        with observe(lazy, site, lambda x: seen.append(x.float())):
            run()
        return torch.cat(seen)

    before = inputs()
    source = torch.zeros(site.in_features, dtype=torch.int64, device=before.device)
    rows = torch.arange(mapping.channels, device=before.device)
    place = 1
    while place < mapping.channels or place == 1:
        spelled = torch.exp2((rows // place % DIGIT - DIGIT // 2).float())
        with _divided(lazy.model, mapping, spelled.reciprocal().expand(mapping.experts, -1)):
            after = inputs()
        power = (after.abs().amax(0) / before.abs().amax(0)).log2().round()
        off = (after - before * power.exp2()).abs().amax(0)
        if not bool((power.isfinite() & (off <= 2**-8 * after.abs().amax(0))).all()):
            return None
        digit = power.to(torch.int64) + DIGIT // 2
        if not bool(((digit >= 0) & (digit < DIGIT)).all()):
            return None
        source += digit * place
        place *= DIGIT
    return source if bool((source < mapping.channels).all()) else None


# -- proving ------------------------------------------------------------------------------------------------------


def _unsupported_reason(
    model: Any, mapping: SmoothingMapping, run: Callable[[], Tensor], expected: Tensor
) -> str | None:
    """Why a fold changes the block, or None."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-1, 2, (mapping.experts, mapping.channels), generator=generator)
    scales = torch.exp2(powers.to(expected.device).float())
    with _divided(model, mapping, scales):
        broken = (run() - expected).float().norm()
        with _multiplied(model, mapping, scales):
            change = (run() - expected).float().norm()
    if not bool(broken > 0):
        return f"{mapping.smooth_layer} has no effect on the block's output, so scales in it could not be checked"
    if not bool(change <= TOLERANCE.get(expected.dtype, TOLERANCE[torch.float32]) * broken):
        return f"scales in {mapping.smooth_layer} change the block's output: something else reads what it makes"
    return None


@contextmanager
def _divided(model: Any, mapping: SmoothingMapping, scales: Tensor) -> Iterator[None]:
    """The giver divided by scales [E, channels] for the time of the context; powers of two come back exactly."""
    with ExitStack() as undo:
        weight = model.get_parameter(mapping.smooth_layer)
        rows = slice(mapping.start, mapping.start + mapping.channels)
        if weight.dim() == 1:
            # What is stored around zero is not exact after a division; in fp32 it is exact enough to be judged.
            undo.callback(setattr, weight, "data", weight.data)
            weight.data = divided_norm(weight.float() if mapping.offset else weight, scales[0], mapping.offset)
        else:
            part = undo.enter_context(_restored(stack(model, mapping.smooth_layer)[:, rows]))
            part.div_(scales[:, :, None].to(part.dtype))
        if mapping.bias is not None:
            part = undo.enter_context(_restored(model.get_parameter(mapping.bias)[rows]))
            part.div_(scales[0].to(part.dtype))
        yield


@contextmanager
def _multiplied(model: Any, mapping: SmoothingMapping, scales: Tensor) -> Iterator[None]:
    """The readers' columns times their scales for the time of the context."""
    inputs = mapping.inputs(scales)
    with ExitStack() as undo:
        for balance_layer in mapping.balance_layers:
            columns = undo.enter_context(_restored(stack(model, balance_layer)))
            columns.mul_(inputs[:, None, :].to(columns.dtype))
        yield


def divided_norm(weight: Tensor, scales: Tensor, offset: float) -> Tensor:
    """The weight of a norm n * (w + offset) whose output is divided by `scales`, in the weight's dtype."""
    return ((weight.float() + offset) / scales - offset).to(weight.dtype)


@contextmanager
def _restored(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor that may be written into for the time of the context and then holds again what it did."""
    kept = tensor.clone()
    try:
        yield tensor
    finally:
        tensor.copy_(kept)
