"""Conditions that published checkpoints come in: low precision, draft layers, other names, experts in one tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    merged: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        merged |= load_file(path)
    return merged


def _store(folder: Path, tensors: dict[str, Any], **changes: Any) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))


def _linears(model: Any, tensors: dict[str, Any]) -> list[str]:
    """Matrices of the decoder blocks but for routers, by the checkpoint's names."""
    router = re.compile(r"(gate|router\w*|gating)\.weight$")
    return [n for n, t in tensors.items() if re.search(r"\.\d+\.", n) and t.dim() == 2 and not router.search(n)]


def _fp8(folder: Path, model: Any) -> None:
    """Blocks of 128 x 128 with `weight_scale_inv`, as DeepSeek, Qwen and MiniMax publish."""
    tensors = _tensors(folder)
    for name in _linears(model, tensors):
        w = tensors[name].float()
        if w.dim() != 2:
            continue
        rows, cols = -(-w.shape[0] // 128), -(-w.shape[1] // 128)
        padded = torch.zeros(rows * 128, cols * 128)
        padded[: w.shape[0], : w.shape[1]] = w
        blocks = padded.view(rows, 128, cols, 128)
        scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
        coded = (blocks / scale[:, None, :, None]).view(rows * 128, cols * 128)[: w.shape[0], : w.shape[1]]
        tensors[name] = coded.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    _store(
        folder,
        tensors,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    )


def _fp8tensor(folder: Path, model: Any) -> None:
    """One scale a tensor, in compressed-tensors' float-quantized form, as RedHat and Mistral publish."""
    tensors = _tensors(folder)
    for name in _linears(model, tensors):
        w = tensors[name].float()
        scale = w.abs().amax() / 448
        tensors[name] = (w / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.to(torch.bfloat16).view(1)
    _store(
        folder,
        tensors,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "tensor",
                        "symmetric": True,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        },
    )


def _mxfp4(folder: Path, model: Any) -> None:
    """Blocks of 32 in E2M1 with E8M0 scales, as gpt-oss is published."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    tensors = _tensors(folder)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        w = tensors.pop(name).float().transpose(1, 2).contiguous()  # [E, out, in]
        blocks = w.view(*w.shape[:2], -1, 32)
        exponent = (blocks.abs().amax(-1).clamp(min=1e-12) / 6).log2().ceil()
        coded = (blocks / exponent.exp2()[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = coded[..., ::2] | (coded[..., 1::2] << 4)
        tensors[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    _store(
        folder,
        tensors,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    )


def _mtp(folder: Path, model: Any) -> None:
    """A further layer that drafts tokens, which transformers has no use for."""
    tensors = _tensors(folder)
    count = model.config.num_hidden_layers
    last = {k: v for k, v in tensors.items() if f"layers.{count - 1}." in k}
    start = "mtp.layers.0." if model.config.model_type.startswith("qwen3_") else f"model.layers.{count}."
    for name, tensor in last.items():
        tensors[start + name.split(f"layers.{count - 1}.")[1]] = tensor.clone()
    hidden = model.config.hidden_size
    tensors[f"{start}eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
    tensors |= {f"{start}{norm}.weight": torch.ones(hidden).bfloat16() for norm in ("enorm", "hnorm")}
    _store(folder, tensors, num_nextn_predict_layers=1)


def _kimi_k2(folder: Path, model: Any) -> None:
    """Kimi-K2 calls itself model_type kimi_k2, class DeepseekV3ForCausalLM, and brings Python files."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _vlprefix(folder: Path, model: Any) -> None:
    """Text class, tensors under the wrapper's prefix (language_model.model.*), as some text-only repacks have."""
    _store(folder, {f"language_model.{k}": v for k, v in _tensors(folder).items()})


def _fused(folder: Path, model: Any) -> None:
    """All experts of a layer in one 3-D tensor under the model's own name, as Qwen3.5-MoE is published."""
    tensors = {k: v for k, v in _tensors(folder).items() if not re.search(r"[.]experts[.][0-9]+[.]", k)}
    tensors |= {
        k: v.detach() for k, v in model.state_dict().items() if re.search(r"[.]experts[.](gate_up|down)_proj$", k)
    }
    _store(folder, {k: v.to(dtype=next(iter(tensors.values())).dtype) for k, v in tensors.items()})


def _bin(folder: Path, model: Any) -> None:
    tensors = _tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def _4bit(folder: Path, model: Any) -> None:
    """As int4 compressed-tensors, packed per expert, as Kimi-K2-Thinking and K2.5 are published."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = _tensors(folder)
    for name in [n for n in _linears(model, tensors) if ".experts." in n]:
        w = tensors.pop(name).float()
        groups = w.view(w.shape[0], -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-8).bfloat16().float()
        codes = (groups / scale).round().clamp(-8, 7).view_as(w).to(torch.int8)
        base = name.removesuffix(".weight")
        tensors[f"{base}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{base}.weight_scale"] = scale.squeeze(-1).bfloat16()
        tensors[f"{base}.weight_shape"] = torch.tensor(w.shape)
    _store(
        folder,
        tensors,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 32,
                        "symmetric": True,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        },
    )


CONDITION = {
    "fp8": _fp8,
    "fp8tensor": _fp8tensor,
    "mxfp4": _mxfp4,
    "mtp": _mtp,
    "kimi_k2": _kimi_k2,
    "vlprefix": _vlprefix,
    "bin": _bin,
    "4bit": _4bit,
    "fused": _fused,
    "sharded": lambda *_: None,
    "moe": lambda *_: None,
    "dense": lambda *_: None,
    "nople": lambda *_: None,
}
