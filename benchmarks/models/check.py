"""What a quantized checkpoint computes, beside a dense model that compressed-tensors' own unpacking makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.model.lazy_model import LazyModel

TOKENS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(5))
SAME = 0.05
"""Largest difference of logits, in units of their spread, at the median position: a choice of experts may flip."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    merged: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        merged |= load_file(path)
    return merged


def unpack(source: Path, out: Path, dense: Path) -> int:
    """Write `out` as a dense fp32 checkpoint in the names of `source`; how many Linears were packed."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = tensors_of(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (width,) = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    for linear in packed:
        shape = torch.Size(tensors.pop(f"{linear}.weight_shape").tolist())
        codes = unpack_from_int32(tensors.pop(f"{linear}.weight_packed"), width, shape).float()
        scale = tensors.pop(f"{linear}.weight_scale").float()
        tensors[f"{linear}.weight"] = (codes.view(shape[0], scale.shape[1], -1) * scale[..., None]).view(shape)
    _fuse(source, tensors)
    dense.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, dense / "model.safetensors")
    original = json.loads((source / "config.json").read_text())
    original.pop("quantization_config", None)
    (dense / "config.json").write_text(json.dumps(original))
    return len(packed)


def _fuse(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put what was written one by one back into the tensors that the source has."""
    with open_checkpoint(source) as checkpoint:
        slices = LazyModel.from_folder(source, checkpoint).split(lambda names: True)
        for name, part in slices.items():
            if name not in tensors:
                continue
            single = tensors.pop(name).float()
            whole = tensors.setdefault(part.tensor, checkpoint.load(part.tensor).float())
            matrix = whole if part.expert is None else whole[part.expert]
            (matrix.mT if part.transposed else matrix)[part.start :: part.step][: part.shape[0]] = single


def load(row: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The fp32 model of a row, by an automatic class or by the one it names if its type is unknown, and what lacks."""
    import transformers

    named = json.loads((folder / "config.json").read_text())
    cls = transformers.AutoModelForMultimodalLM if row.endswith("+vl") else transformers.AutoModelForCausalLM
    how = {}
    known = named["model_type"] in transformers.CONFIG_MAPPING  # its `get` knows fewer
    if not known or transformers.CONFIG_MAPPING[named["model_type"]] not in cls._model_mapping:
        cls = getattr(transformers, named["architectures"][0])
        how["config"] = cls.config_class.from_pretrained(folder)
        how["config"].model_type = cls.config_class.model_type
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    return model, info


def outputs(row: str, folder: Path) -> dict[str, Any]:
    """fp32 logits of two rows of tokens, five greedy tokens, and what was not found when the folder was loaded."""
    model, info = load(row, folder)
    with torch.inference_mode():
        try:
            logits = model.eval()(input_ids=TOKENS, use_cache=False).logits.float()
        except AttributeError:  # Llama 4 in transformers 5.24, behind the language model: it looks for images' outputs
            logits = model.language_model(input_ids=TOKENS, use_cache=False).logits.float()
        try:
            ids = model.generate(input_ids=TOKENS[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        except Exception:  # noqa: BLE001  # some classes do not generate from text alone
            ids = None
    return {
        "logits": logits,
        "greedy": None if ids is None else ids[0, -5:].tolist(),
        "missing": sorted(map(str, info["missing_keys"]))[:2],
    }


def reference(row: str, source: Path, out: Path, work: Path) -> dict[str, Any]:
    """Outputs of the dense model that `out` stands for, as it is and rounded to bf16; saved in `work`."""
    dense = work / "dense"
    packed = unpack(source, out, dense)
    outputs_by_dtype = {"fp32": outputs(row, dense)}
    if outputs_by_dtype["fp32"]["missing"]:
        raise ValueError(
            f"transformers does not load the dense model: it misses {outputs_by_dtype['fp32']['missing'][0]}"
        )
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors_of(dense).items()}
    save_file(tensors, dense / "model.safetensors")
    outputs_by_dtype["bf16"] = outputs(row, dense)  # transformers expands to the scales' dtype
    torch.save(outputs_by_dtype, work / "reference.pt")
    shutil.rmtree(dense)
    return {"packed": packed}


def compared(row: str, out: Path, work: Path, with_sarqc: bool) -> dict[str, Any]:
    """How `out` differs from the reference, loaded by transformers with or without sarqc."""
    import sarqc

    (sarqc.register if with_sarqc else sarqc.unregister)()
    actual = outputs(row, out)
    wanted = torch.load(work / "reference.pt", weights_only=False)
    apart = [(actual["logits"] - one["logits"]).abs().amax(-1) / one["logits"].std() for one in wanted.values()]
    median = min(one.median().item() for one in apart)
    same = not actual["missing"] and median < SAME
    greedy = None if actual["greedy"] is None else actual["greedy"] in [one["greedy"] for one in wanted.values()]
    return {"same": same, "difference": round(median, 4), "greedy": greedy, "missing": actual["missing"]}
