"""Tiny random models of every architecture the model room must take without a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import TensorSource
from tests.support.blocks import run_blocks

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=16, **TWO_KINDS)),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **TWO_KINDS,
        ),
    ),
}
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
TAKEN = tuple(name for name in CONFIGS if name != "gpt_oss")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, names in (("arch", TAKEN), ("moe_arch", MOE), ("any_arch", tuple(CONFIGS))):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads that wait for each other take five times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FolderSource:
    """Dense tensors of a folder of safetensors files, read one at a time; counts what is read."""

    def __init__(self, folder: Path) -> None:
        self.files = {}
        self.reads: list[str] = []
        self.stack = ExitStack()
        for path in sorted(folder.glob("*.safetensors")):
            handle = self.stack.enter_context(safe_open(path, "pt"))
            self.files |= dict.fromkeys(handle.keys(), handle)

    def names(self) -> list[str]:
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return {"F32": torch.float32, "BF16": torch.bfloat16}[self.files[name].get_slice(name).get_dtype()]

    def load(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.files[name].get_tensor(name).clone()  # its own memory, as the contract has it

    def quantized(self, linear: str) -> QuantizedWeight | None:
        return None


class StateDictSource:
    """A source over tensors that are already in memory, with some weights optionally quantized.

    tensors: dense tensors by name. quantized: linear layers by name (without ".weight"), E = 1; they join the dense
    view as `dtype`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        quantized: Mapping[str, QuantizedWeight] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._tensors = dict(tensors)
        self._quantized = {f"{linear}.weight": weight for linear, weight in (quantized or {}).items()}
        self._dtype = dtype

    def names(self) -> list[str]:
        """Names of all dense tensors, sorted."""
        return sorted(self._tensors.keys() | self._quantized.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor."""
        if name in self._quantized:
            return tuple(self._quantized[name].codes.shape[1:])
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a dense tensor."""
        return self._dtype if name in self._quantized else self._tensor(name).dtype

    def load(self, name: str) -> Tensor:
        """A copy of the dense tensor, on the CPU."""
        if name in self._quantized:
            return self._quantized[name].dequantize(self._dtype)[0].cpu()
        return self._tensor(name).detach().to("cpu", copy=True)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes of a linear layer, or None where it is dense."""
        return self._quantized.get(f"{linear}.weight")

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"tensor {name!r} is not in this source: it has {len(self._tensors)} others")
        return self._tensors[name]


@dataclass
class Tiny:
    """A model, the folder it was saved to, and tokens for it."""

    model: Any
    folder: Path
    source: FolderSource
    tokens: Tensor

    def lazy(self, source: TensorSource | None = None) -> LazyModel:
        return LazyModel.from_folder(self.folder, source or self.source)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint as a dictionary."""
        return {name: self.source.load(name) for name in self.source.names()}


Make = Callable[..., Tiny]


@pytest.fixture
def rounded() -> Callable[..., StateDictSource]:
    """rounded(case, quant, dtype): the checkpoint of a tiny model with its targets RTN."""

    def quantize(case: Tiny, quant: QuantConfig, dtype: torch.dtype = torch.float32) -> StateDictSource:
        results = run_blocks(case.lazy(), case.source, None, quant, MethodConfig("rtn"))
        weights = {name: weight for result in results for name, weight in result.weights.items()}
        dense = {name: t for name, t in case.tensors().items() if name.removesuffix(".weight") not in weights}
        return StateDictSource(dense, weights, dtype)

    return quantize


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Make]:
    """tiny(name, dtype=..., **config changes): a random model with eager experts, saved and opened again."""
    sources: list[FolderSource] = []

    def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Tiny:
        kind, own = CONFIGS[name]
        config = getattr(transformers, kind)(**(BASE | own | changes))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if hasattr(model.config, "num_local_experts") or hasattr(model.config, "num_experts"):
            model.set_experts_implementation("eager")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("e_score_correction_bias"):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        folder = tmp_path / f"{name}-{len(sources)}"
        model.save_pretrained(folder)
        sources.append(FolderSource(folder))
        tokens = torch.randint(3, config.vocab_size, (5, 20), generator=generator)
        return Tiny(model, folder, sources[-1], tokens)

    yield make
    for source in sources:
        source.stack.close()
