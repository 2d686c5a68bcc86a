"""The number format of quantized weights, as options of a run and as what one layer follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from sarqc import kinds
from sarqc.errors import ArgumentError
from sarqc.kinds import AUTO
from sarqc.options import Config, default_of, described, option

BIT_OPTIONS = (2, 3, 4, 5, 6, 8)
"""Bit-widths that `avg_bits` chooses from by default."""


@described
@dataclass(frozen=True)
class QuantConfig(Config):
    """The number format of the quantized weights. With `avg_bits`, `bits` is the width that estimates use."""

    panel: ClassVar[str] = "Weights"

    bits: int = option(4, kinds.whole(2, 8), "Bits per weight.")
    group_size: int | Literal["auto"] = option(
        AUTO,
        kinds.group_size(),
        "Inputs that share one scale. -1: one scale per output row. auto: the largest of 128, 64, 32 that divides "
        "the inputs of every layer.",
    )
    sym: bool = option(
        True,
        kinds.switch(),
        "Symmetric: the zero point is the middle code. Asymmetric: each group stores a zero point.",
        flag="--sym/--asym",
    )
    ignore: Sequence[str] = option(
        (),
        kinds.several(kinds.regex(), repeated=True),
        "Regular expression; Linears whose names match stay unquantized.",
    )
    include: Sequence[str] = option(
        (),
        kinds.several(kinds.regex(), repeated=True),
        "Regular expression; Linears behind the decoder blocks and embeddings whose names match are quantized too: "
        "lm_head, embed_tokens.",
    )
    embedding_bits: int | None = option(
        None,
        kinds.whole(2, 8),
        "Bits of embeddings that include finds.",
        default_text="as bits",
    )
    avg_bits: float | None = option(
        None,
        kinds.number(2, 16),
        "Average bits per weight, scales included, in place of bits: each layer gets a width by its sensitivity.",
        default_text="not set",
    )
    bit_options: Sequence[int] = option(
        (),
        kinds.several(kinds.whole(2, 8)),
        "Bit-widths that avg_bits chooses from. Marlin kernels run 4,8.",
        default_text="2,3,4,5,6,8",
        old=("bits_choices",),
    )
    format: str = option(
        "compressed-tensors",
        kinds.text("the name of a checkpoint format"),
        "Checkpoint format: compressed-tensors (vLLM, SGLang and transformers load it), gptq, gptq_v2, awq or mlx.",
        resume="free",
    )
    tp: int | None = option(
        None,
        kinds.whole(1),
        "Tensor-parallel size for serving; the run fails at the start if no runtime supports it.",
        default_text="not checked",
        resume="free",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_bits is not None and not self.include:
            raise ArgumentError(
                f"embedding_bits = {self.embedding_bits} has no effect alone: include embeddings too, as 'embed_tokens'"
            )
        if self.avg_bits is None:
            if self.bit_options:
                raise ArgumentError(f"bit_options = {self.bit_options} has no effect alone: give avg_bits too")
            return
        if self.include:
            raise ArgumentError(
                f"include = {self.include} and avg_bits = {self.avg_bits:g} exclude each other, because bits are "
                "allocated to layers of decoder blocks: give bits, or leave include out"
            )
        widths = tuple(sorted(set(self.bit_options or BIT_OPTIONS)))
        nominal = min(width for width in widths if width >= min(self.avg_bits, widths[-1]))
        if self.bits not in (default_of(QuantConfig, "bits"), nominal):
            raise ArgumentError(
                f"bits = {self.bits} and avg_bits = {self.avg_bits:g} exclude each other: give one of them"
            )
        object.__setattr__(self, "bit_options", widths)
        object.__setattr__(self, "bits", nominal)

    @classmethod
    def made(cls, base: Self | None, given: Mapping[str, Any]) -> Self:
        """`base` with the options `given`, which may not hold both `bits` and `avg_bits`."""
        if "bits" in given and "avg_bits" in given:
            raise ArgumentError(
                f"bits = {given['bits']!r} and avg_bits = {given['avg_bits']!r} exclude each other: give one of them"
            )
        return super().made(base, given)

    def of(self, embedding: bool) -> QuantConfig:
        """The format of an embedding, or of a Linear."""
        return self.at(self.embedding_bits) if embedding and self.embedding_bits else self

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    def at(self, bits: int) -> QuantConfig:
        """The format of layers of `bits`, where layers have different widths."""
        return dataclasses.replace(self, bits=bits, avg_bits=None, bit_options=(), embedding_bits=None)

    def divides(self, in_features: int) -> bool:
        """Whether a Linear with `in_features` inputs has whole groups; with "auto" that is seen later."""
        size = self.group_size
        return isinstance(size, str) or size < 0 or in_features % size == 0

    def columns_per_group(self, in_features: int) -> int:
        """Inputs that share a scale, in a Linear with `in_features` inputs.

        Raises:
            ArgumentError: The group size does not divide them, or is not chosen yet.
        """
        if self.group_size == AUTO:
            raise ArgumentError("group_size = 'auto' is not resolved: give a number for a layer alone")
        if not self.divides(in_features):
            raise ArgumentError(f"group_size = {self.group_size} does not divide {in_features} inputs")
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups per row of a Linear with `in_features` inputs; `ArgumentError` where groups do not divide them."""
        return in_features // self.columns_per_group(in_features)
