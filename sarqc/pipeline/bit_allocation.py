"""Mixed precision: the bit-width of each layer, measured once, allocated once and kept in the work folder.

Runtimes fuse q, k and v, gate and up, and all experts of a layer with both their projections, so those are one unit.
The loss of a unit at each bit-width is the sum over its sites (`pipeline.sensitivity`). The least sum over all units
within the average is a knapsack (`method.bit_allocation`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sarqc.config import QuantConfig
from sarqc.conventions import FUSED
from sarqc.errors import CheckpointError
from sarqc.method.bit_allocation import Unit, allocate, stored_bits
from sarqc.pipeline.comm import Comm, gather
from sarqc.pipeline.execution import Execution
from sarqc.pipeline.journal import OnProgress
from sarqc.pipeline.plan import Plan
from sarqc.pipeline.sensitivity import SiteSensitivity, measure_sensitivity


@dataclass(frozen=True)
class UnitBits:
    """A unit and its bit-width. name: of its first site. losses: by bit-width, as a decimal string (a JSON key)."""

    name: str
    bits: int
    weights: int
    losses: dict[str, float]
    linears: tuple[str, ...]


@dataclass(frozen=True)
class BitAllocation:
    """average: bits per weight of all units, scales included. seconds: spent on the measurement."""

    average: float
    seconds: float
    units: tuple[UnitBits, ...]

    def by_linear(self) -> dict[str, int]:
        """Bits of every quantized Linear."""
        return {linear: unit.bits for unit in self.units for linear in unit.linears}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BitAllocation:
        """What `to_json` wrote; `CheckpointError` for anything else."""
        try:
            units = tuple(UnitBits(**unit | {"linears": tuple(unit["linears"])}) for unit in values["units"])
            return cls(float(values["average"]), float(values["seconds"]), units)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the bit allocation of a run is not what was written ({error})") from error

    def record(self) -> dict[str, Any]:
        """For a report: units without the names of all their Linears."""
        units = [{key: value for key, value in asdict(unit).items() if key != "linears"} for unit in self.units]
        return {"average": round(self.average, 4), "units": units}

    def headline(self) -> str:
        """Share of the weights at each bit-width, in a line."""
        total = sum(unit.weights for unit in self.units)
        shares = dict.fromkeys(sorted({unit.bits for unit in self.units}), 0)
        for unit in self.units:
            shares[unit.bits] += unit.weights
        shares_text = ", ".join(f"{count / total:.0%} of the weights at {bits} bits" for bits, count in shares.items())
        return f"{self.average:.3f} bits on average: {shares_text}"


def allocate_bits(plan: Plan, tokens: Tensor, comm: Comm, on_progress: OnProgress) -> BitAllocation:
    """Measure the sensitivities and allocate; ranks take blocks in turn, and all return the same."""
    began = time.perf_counter()

    def own() -> list[tuple[int, SiteSensitivity]]:
        return measure_sensitivity(
            plan.lazy,
            plan.checkpoint,
            plan.targets,
            tokens,
            plan.quant,
            plan.method,
            Execution(
                device=plan.device,
                dtype=plan.dtype,
                micro_batch=plan.run.micro_batch,
                gram_budget=plan.run.gram_budget,
                seed=plan.calibration.seed,
                on_progress=on_progress,
            ),
            mine=lambda index: index % comm.size == comm.rank,
        )

    measured = [one for part in gather(comm, own) for one in part]
    sites = [site for _, site in sorted(measured, key=lambda one: one[0])]  # stable: in a block they keep their order
    return choose(sites, plan.quant, comm.all_gather_object(time.perf_counter() - began)[0])


def choose(sites: Sequence[SiteSensitivity], quant: QuantConfig, seconds: float = 0.0) -> BitAllocation:
    """The allocation for all sites of a model from their losses. seconds: spent on the measurement."""
    assert quant.avg_bits is not None
    joined = _joined(sites)
    units = [_unit(members, quant) for members in joined]
    bit_widths = allocate(units, quant.avg_bits)
    chosen = tuple(
        UnitBits(
            unit.name,
            width,
            unit.weights,
            {str(bits): loss for bits, loss in unit.losses.items()},
            tuple(linear for site in members for linear in site.linears),
        )
        for unit, width, members in zip(units, bit_widths, joined)
    )
    spent = sum(unit.sizes[width] for unit, width in zip(units, bit_widths))
    return BitAllocation(spent / sum(unit.weights for unit in units), seconds, chosen)


def _joined(sites: Sequence[SiteSensitivity]) -> list[list[SiteSensitivity]]:
    """Sites that must have one bit-width, in order of the first of each: of one module, or fused by name."""
    groups: list[tuple[set[str], list[int]]] = []
    for number, site in enumerate(sites):
        keys = {*site.modules, *(name for linear in site.linears if (name := _fused(linear)))}
        touched = [group for group in groups if group[0] & keys]
        groups = [group for group in groups if group not in touched]
        groups.append((keys.union(*(own for own, _ in touched)), sum((ones for _, ones in touched), [number])))
    return [[sites[number] for number in numbers] for numbers in sorted(sorted(numbers) for _, numbers in groups)]


def _fused(linear: str) -> str | None:
    """A name for the matrix that runtimes fuse this Linear into; None where they fuse nothing."""
    parent, _, leaf = linear.rpartition(".")
    family = next((names for names in FUSED if leaf in names), None)
    return f"{parent}.{'+'.join(family)}" if family else None


def _unit(sites: Sequence[SiteSensitivity], quant: QuantConfig) -> Unit:
    shapes = [shape for site in sites for shape in site.shapes]
    return Unit(
        name=sites[0].site,
        weights=sum(rows * columns for rows, columns in shapes),
        sizes={width: sum(stored_bits(shape, width, quant) for shape in shapes) for width in quant.bit_options},
        losses={width: sum(site.losses[width] for site in sites) for width in quant.bit_options},
    )
