"""The tokenizer of a checkpoint folder, and whether its tokens are the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sarqc.errors import ModelError, first_line


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`; `ModelError` of one line where there is none that works."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers check their files with whatever their fields happen to raise
        if not any(folder.glob("*token*")) and not any(folder.glob("*.model")):
            raise ModelError(
                f"{folder} has no tokenizer: put tokenizer.json or its like beside config.json; for a model in memory, "
                "give tokenizer="
            ) from error
        raise ModelError(f"{folder}: its tokenizer does not load: {first_line(error)}") from error


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text, with what the tokenizer puts around it if `special`; `ModelError` where it fails on text."""
    try:
        return [int(token) for token in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]
    except Exception as error:  # the Rust library raises plain `Exception`
        raise ModelError(f"the tokenizer loads but does not work: {first_line(error)}") from error


def check_tokens(tokens: Tensor, model: Any) -> None:
    """`ModelError` where `tokens` (int64, any shape) has one that the model's embedding has no row for, below 0 too.

    That is what the tokenizer of another model does. Without this the embedding fails, on a GPU beyond repair.
    """
    rows = model.get_input_embeddings().num_embeddings
    if not tokens.numel():
        return
    least, greatest = map(int, tokens.aminmax())
    if least < 0:
        raise ModelError(f"the text has token {least}: tokens are numbers from 0 up, without marks for padding")
    if greatest >= rows:
        raise ModelError(
            f"the text has token {greatest}, and the model's embedding has {rows} rows: the tokenizer is another "
            "model's; put the right tokenizer files beside config.json"
        )
