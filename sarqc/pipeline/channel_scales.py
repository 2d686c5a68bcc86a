"""The channel scales of one block: chosen mapping by mapping, then folded into weights and other tensors.

Scales act on fp32 copies of the weights that will be quantized, so nothing is rounded on their way there. Two rules
keep the rest exact. A norm's weight is stored in the checkpoint's dtype, so the scale that counts is the one that its
rounded weight stands for: s = (w + c) / (w' + c). And where a tensor that is not quantized takes part (a router, a
layer that was ignored, a bias), scales are powers of two, which floating-point numbers take without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sarqc.config import QuantConfig
from sarqc.method.awq import BalanceLayer, ChannelScales, Scaling, search
from sarqc.method.gram import Gram
from sarqc.model.lazy_model import LazyModel
from sarqc.model.sites import Site, SiteChunk, stack
from sarqc.model.smoothing import SmoothingMapping, divided_norm
from sarqc.model.source import TensorSource
from sarqc.model.weight_map import TensorSlice
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm, synchronize_oom
from sarqc.pipeline.work_split import cost as price
from sarqc.pipeline.work_split import partition


class BlockScales:
    """Scales of the folds of a loaded block; `reasons` says by site why others have none."""

    def __init__(
        self,
        lazy: LazyModel,
        source: TensorSource,
        sites: Sequence[Site],
        mappings: Sequence[SmoothingMapping],
        reasons: dict[str, str],
        comm: Comm = SINGLE_PROCESS,
    ) -> None:
        self._lazy = lazy
        self._source = source
        self._comm = comm
        self._quantized = {target.linear for site in sites for target in site.members}
        self._mappings: list[SmoothingMapping] = []
        self._reasons = dict(reasons)
        self._chosen: dict[str, ChannelScales] = {}  # by smooth layer
        for mapping in mappings:
            if mapping.offset and self._is_binary(mapping):
                name, offset = mapping.smooth_layer, mapping.offset
                reason = f"{name} stores its weight less {offset:g}, which no scale divides without rounding"
                self._reasons |= {site.name: reason for site in mapping.sites}
            else:
                self._mappings.append(mapping)

    def decide(
        self,
        chunks: Sequence[SiteChunk],
        grams: Sequence[Gram],
        cost: Callable[[SiteChunk, Gram], Tensor],
        quant: Callable[[Site], QuantConfig],
        scale_dtype: torch.dtype,
    ) -> None:
        """Choose what these chunks decide, given their Grams; cost: what errors in a chunk cost (`BalanceLayer.cost`).
        quant: what a site's weights become.

        A scale that many experts share is decided by the first experts whose Grams are there; experts with scales of
        their own decide each for themselves. Ranks share the search.
        """
        model = self._lazy.model
        given = {chunk.site.name: (chunk, gram) for chunk, gram in zip(chunks, grams)}
        open_: list[tuple[SmoothingMapping, list[tuple[SiteChunk, Gram]]]] = []
        for mapping in self._mappings:
            collected = [given[site.name] for site in mapping.sites if site.name in given]
            if collected and not (mapping.experts == 1 and mapping.smooth_layer in self._chosen):
                open_.append((mapping, collected))
        owners = partition([sum(price(chunk) for chunk, _ in collected) for _, collected in open_], self._comm.size)

        def search_own() -> dict[int, ChannelScales]:
            return {
                number: search(
                    [
                        BalanceLayer(chunk.weight(model), cost(chunk, gram), gram, quant(chunk.site))
                        for chunk, gram in collected
                    ],
                    scale_dtype,
                    shared=mapping.experts == 1,
                    binary=self._is_binary(mapping),
                    source=mapping.source,
                    channels=mapping.channels,
                ).to("cpu")
                for number, (mapping, collected) in enumerate(open_)
                if owners[number] == self._comm.rank
            }

        answers = self._comm.all_gather_object(synchronize_oom(self._comm, search_own))

        def take() -> None:
            for number, (mapping, collected) in enumerate(open_):
                self._take(mapping, answers[owners[number]][number].to(collected[0][1].rows.device))

        synchronize_oom(self._comm, take)

    def _take(self, mapping: SmoothingMapping, chosen: ChannelScales) -> None:
        """Keep what was chosen for a fold, behind what its experts before have."""
        if self._lazy.model.get_parameter(mapping.smooth_layer).dim() == 1:
            chosen = ChannelScales(self._storable(mapping, chosen.scales), chosen.exponents)
        before = self._chosen.get(mapping.smooth_layer)
        if before is not None:
            chosen = ChannelScales(
                torch.cat([before.scales, chosen.scales]), torch.cat([before.exponents, chosen.exponents])
            )
        self._chosen[mapping.smooth_layer] = chosen

    def of(self, chunk: SiteChunk) -> Scaling:
        """What happens to the weight of a chunk; ones where nothing does."""
        site, device = chunk.site, stack(self._lazy.model, chunk.site.members[0].parameter).device
        inputs = torch.ones(1, site.in_features, device=device)
        rows = torch.ones(1, sum(count for _, _, count in site.row_ranges), device=device)
        exponent = 0.0
        for mapping, chosen in self._decided():
            at = slice(None) if mapping.experts == 1 else slice(chunk.first, chunk.stop)
            own = chosen.scales[at]
            if site in mapping.sites:
                inputs, exponent = mapping.inputs(own), float(chosen.exponents[at].mean())
            begin = 0
            for parameter, start, count in site.row_ranges:
                if parameter == mapping.smooth_layer:
                    rows = rows.expand(max(len(rows), len(own)), -1).clone()
                    taken, scales = _overlap(rows[:, begin : begin + count], own, mapping.start - start)
                    taken.copy_(scales)
                begin += count
        return Scaling(inputs, rows, exponent, self._reasons.get(site.name))

    def fold_in(self) -> dict[str, Tensor]:
        """Fold the scales into everything of the block that is not quantized, in the model; and the same tensors by
        the checkpoint's names, in its dtypes."""
        changed: dict[str, Tensor] = {}
        at: dict[str, tuple[str, TensorSlice]] = {}

        def take(parameter: str, stored: TensorSlice) -> Tensor:
            if stored.name not in changed:
                changed[stored.name], at[stored.name] = self._source.load(stored.name), (parameter, stored)
            return changed[stored.name]

        for mapping, chosen in self._decided():
            for parameter, stored in self._dense(mapping.smooth_layer):
                own = chosen.scales[(stored.expert or 0) if mapping.experts > 1 else 0].cpu()
                tensor = take(parameter, stored)
                if tensor.dim() == 1:
                    tensor.copy_(divided_norm(tensor, own, mapping.offset))
                else:
                    rows, scales = _overlap(tensor.T, own, mapping.start - stored.start)
                    rows.div_(scales)
            for parameter, stored in self._dense(mapping.bias):
                rows, scales = _overlap(take(parameter, stored), chosen.scales[0].cpu(), mapping.start)
                rows.div_(scales)
            for balance_layer in mapping.balance_layers:
                for parameter, stored in self._dense(balance_layer):
                    own = mapping.inputs(chosen.scales)[(stored.expert or 0) if mapping.experts > 1 else 0].cpu()
                    take(parameter, stored).mul_(own)
        for name, (parameter, stored) in at.items():
            stored.of(self._lazy.model.get_parameter(parameter)).copy_(changed[name])
        return changed

    def _decided(self) -> list[tuple[SmoothingMapping, ChannelScales]]:
        return [
            (mapping, self._chosen[mapping.smooth_layer])
            for mapping in self._mappings
            if mapping.smooth_layer in self._chosen
        ]

    def _dense(self, parameter: str | None) -> list[tuple[str, TensorSlice]]:
        """The slices of a parameter that will not be quantized."""
        slices = self._lazy.slices[parameter] if parameter else ()
        return [(parameter or "", stored) for stored in slices if stored.linear not in self._quantized]

    def _is_binary(self, mapping: SmoothingMapping) -> bool:
        """Whether a tensor that is not quantized takes part, apart from a norm's weight."""
        is_norm = self._lazy.model.get_parameter(mapping.smooth_layer).dim() == 1
        givers = () if is_norm else (mapping.smooth_layer,)
        return mapping.bias is not None or any(
            self._dense(parameter) for parameter in (*givers, *mapping.balance_layers)
        )

    def _storable(self, mapping: SmoothingMapping, scales: Tensor) -> Tensor:
        """The scales [1, C] that a norm's weight can stand for in the dtype it is stored in; 1 where it is closed."""
        name = self._lazy.slices[mapping.smooth_layer][0].name
        weight = self._source.load(name)
        kept = divided_norm(weight, scales[0].cpu(), mapping.offset).float() + mapping.offset
        opened = weight.float() + mapping.offset
        usable = (kept != 0) & (opened != 0)
        return torch.where(usable, opened / torch.where(usable, kept, 1.0), 1.0).to(scales.device)[None]


def _overlap(values: Tensor, scales: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The parts of values [..., n] and of scales [..., c] that meet where the scales begin at `start` of the values."""
    first, stop = max(start, 0), max(start, 0, min(start + scales.shape[-1], values.shape[-1]))
    return values[..., first:stop], scales[..., first - start : stop - start]
