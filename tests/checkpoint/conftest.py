"""Small checkpoint folders and random quantized weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sarqc.checkpoint.formats import FORMATS
from sarqc.checkpoint.side_files import write_config
from sarqc.config import QuantConfig
from sarqc.method.weight import QuantizedWeight
from tests.support.checkpoints import write_weights

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A tensor of each dtype, odd sizes, a scalar and an empty one; NaN and infinity patterns among the bf16 bits."""
    rng = torch.Generator().manual_seed(0)
    stored = {}
    for number, dtype in enumerate(DTYPES):
        shape = (3 + number, 5)
        raw = torch.randint(0, 256, (*shape[:1], shape[1] * dtype.itemsize), generator=rng, dtype=torch.uint8)
        stored[f"layer.{number}.weight"] = (raw & 1).bool() if dtype == torch.bool else raw.view(dtype)
    stored["scalar"] = torch.tensor(7, dtype=torch.int64)
    stored["empty"] = torch.empty(0, 4, dtype=torch.float16)
    return stored


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(shards, config={}, name="model"): shards is {file name: tensors}; more than one gets an index."""

    def make(
        shards: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any] | None = None, name: str = "model"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(config or {"model_type": "llama"})))
        for file, content in shards.items():
            save_file(content, folder / file, metadata={"format": "pt"})
        if set(shards) != {"model.safetensors"}:
            weight_map = {tensor: file for file, content in shards.items() for tensor in content}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture
def two_shards(make_folder: Callable[..., Path]) -> Path:
    a = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.arange(5)}
    return make_folder(
        {"model-00001-of-00002.safetensors": a, "model-00002-of-00002.safetensors": {"c": torch.ones(7)}}
    )


@pytest.fixture
def random_weight() -> Callable[..., QuantizedWeight]:
    """random_weight(rows, columns, bits, group_size, sym, dtype): codes from all levels, zeros too if asymmetric."""

    def make(
        rows: int, columns: int, bits: int, group_size: int, sym: bool, dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedWeight:
        rng = torch.Generator().manual_seed(rows * 1000 + columns * 10 + bits)
        groups = 1 if group_size == -1 else columns // group_size
        codes = torch.randint(0, 1 << bits, (1, rows, columns), generator=rng, dtype=torch.uint8)
        drawn = 2 * torch.rand((1, rows, groups), generator=rng) - 1
        scales = (drawn * 0.1 + drawn.sign() * 1e-3).to(dtype)
        zeros = torch.randint(0, 1 << bits, (1, rows, groups), generator=rng, dtype=torch.uint8)
        middle = torch.full_like(zeros, 1 << (bits - 1))
        return QuantizedWeight(codes, scales, middle if sym else zeros, bits)

    return make


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes (NaN patterns included)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8))


@pytest.fixture
def bitwise() -> Callable[[Tensor, Tensor], bool]:
    return same_bits


@pytest.fixture
def quantized_folder(
    tmp_path: Path, random_weight: Callable[..., QuantizedWeight]
) -> tuple[Path, dict[str, QuantizedWeight]]:
    """Two Linears (3 bits, asymmetric), a bias and a norm, in shards; returns the folder and the weights."""
    packed, quant = FORMATS["compressed-tensors"], QuantConfig(3, 24, sym=False)
    weights = {f"model.layers.0.mlp.experts.{i}.up_proj": random_weight(7 + i, 72, 3, 24, False) for i in range(2)}
    folder = tmp_path / "quantized"
    tensors = {"model.layers.0.mlp.experts.0.up_proj.bias": torch.arange(7.0)}
    tensors["lm_head.weight"] = torch.ones(3, 4, dtype=torch.bfloat16)
    for name, weight in weights.items():
        tensors |= packed.pack(name, weight, quant)
    write_weights(folder, tensors, shard_bytes=300)
    write_config(folder, {"model_type": "x"}, packed, packed.config(quant, ["lm_head"]))
    return folder, weights
