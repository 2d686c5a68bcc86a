"""Is a checkpoint sound: every tensor as written, every weight of the model there once, and near its original?

Three checks: the files (`sarqc.checkpoint.verify`); the model that config.json describes, which must find each of its
weights; and, given the source, every tensor against the source's. The last one also compares the error of each weight
with the one in report.json. The result also lists the runtimes that support the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sarqc.checkpoint import verify as files
from sarqc.checkpoint.differences import compare, missing_names
from sarqc.checkpoint.file_sums import has_record
from sarqc.checkpoint.formats import NEUTRAL, quantization_of
from sarqc.checkpoint.formats.compressed_tensors_config import takes
from sarqc.checkpoint.manifest import MANIFEST
from sarqc.checkpoint.reader import Checkpoint, Storage, open_checkpoint
from sarqc.errors import CheckpointError, ModelError
from sarqc.method.weight import QuantizedWeight
from sarqc.model.lazy_model import LazyModel
from sarqc.model.tied import separate
from sarqc.report import report as reports
from sarqc.serving.compatibility import checkpoint_support
from sarqc.serving.rules import RuntimeSupport

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, name of the tensor)."""

_TOLERANCE = 1e-6
"""Relative; the same numbers summed in another order."""


@dataclass
class Verified:
    """What was found in `folder`.

    problems: a line each, none where it is sound. manifest: whether tensors could be compared with what was written.
    files: whether the files beside the weights could be.
    facts: format and numbers of tensors, files, bytes. stored: what of it is counted, where the headers are sound.
    errors: relative error ||W - Q|| / ||W|| of each quantized weight, where there was a source to compare with.
    serve: what the servers make of it, where it is sound.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    manifest: bool = False
    files: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    stored: Storage | None = None
    errors: dict[str, float] = field(default_factory=dict)
    serve: list[RuntimeSupport] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def require(self) -> None:
        """`CheckpointError` with the first problem, and how many more there are."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise CheckpointError(self.problems[0] + more)

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        mean = sum(self.errors.values()) / len(self.errors) if self.errors else None
        return {
            "folder": str(self.folder),
            "sound": self.sound,
            "problems": self.problems,
            "manifest": self.manifest,
            "files": self.files,
            **self.facts,
            "serve": [asdict(one) for one in self.serve],
            "weight_error": mean,
            "weight_errors": self.errors,
        }


def check(
    folder: Path,
    source: Checkpoint | None,
    *,
    rescaled: Collection[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Look at the checkpoint in `folder`; what is wrong with it is in the result, never an exception.

    Args:
        folder: The checkpoint.
        source: The open checkpoint that it was made of.
        rescaled: Tensors that took up channel scales and say nothing beside the source's. By default, those that
            report.json names.
        trust_remote_code: Run the Python files of the model.
        progress: Called as progress(done, total, tensor).
    """
    result = Verified(folder)
    try:
        with open_checkpoint(folder) as checkpoint:
            steps = _Steps(progress, len(checkpoint.parts()))
            result.manifest, result.files = (folder / MANIFEST).exists(), has_record(folder)
            if source is not None:
                _split_alike(checkpoint, source, trust_remote_code)
            beside = None if source is None else _SourceComparison(result, checkpoint, source, rescaled)
            result.problems += missing_names(checkpoint, source) if source else ()
            result.problems += files.problems(checkpoint, steps.step, beside)
            result.stored = checkpoint.storage()
            result.facts = _facts(checkpoint, result.stored)
            _model(result, checkpoint, trust_remote_code)
    except CheckpointError as error:
        result.problems.append(str(error))
    return result


def _split_alike(checkpoint: Checkpoint, source: Checkpoint, trust_remote_code: bool) -> None:
    """Show the source's matrices one by one, and turned, and a tied one twice, where the checkpoint has them so."""
    ours, theirs, packed = set(checkpoint.names()), set(source.names()), set(checkpoint.linears())
    if theirs == ours and all(checkpoint.shape(name) == source.shape(name) for name in theirs):
        return
    try:
        lazy = LazyModel.from_folder(source.folder, source, trust_remote_code=trust_remote_code)
    except ModelError:
        return  # the names that differ are reported one by one
    single = {name.removesuffix(".weight") for name in ours - theirs}
    source.split(separate(lazy, source, single.__contains__))
    source.split(lazy.split(lambda names: any(name in single or name in packed for name in names)))


@dataclass
class _Steps:
    progress: Progress | None
    total: int
    done: int = 0

    def step(self, name: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, name)


def _facts(checkpoint: Checkpoint, stored: Storage) -> dict[str, Any]:
    return {
        "format": checkpoint.format.name if checkpoint.format else None,
        "tensors": stored.tensors,
        "shards": stored.shards,
        "bytes": stored.total_bytes,
        "quantized_linears": stored.quantized_linears,
        "bits_per_weight": stored.bits_per_weight,
    }


def _model(result: Verified, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Adds what keeps transformers from finding every weight of the model, each once and of the right shape; or what
    servers make of the model."""
    try:
        lazy = LazyModel.from_folder(checkpoint.folder, checkpoint, trust_remote_code=trust_remote_code)
        result.problems += _taken_for_quantized(checkpoint, lazy)
        result.serve = checkpoint_support(checkpoint, lazy) if result.sound else []
    except ModelError as error:
        result.problems.append(f"{checkpoint.folder} is no whole model: {error}")


def _taken_for_quantized(checkpoint: Checkpoint, lazy: LazyModel) -> Iterator[str]:
    """Linears that transformers takes for quantized, by its own names and the config, and whose weights are not."""
    if checkpoint.format is not NEUTRAL:
        return
    quantization, stored = quantization_of(checkpoint.config), set(checkpoint.linears())
    for name, module in lazy.model.named_modules():
        slices = lazy.slices.get(f"{name}.weight", ())
        if not isinstance(module, nn.Linear) or any(one.linear in stored for one in slices):
            continue
        if takes(name, quantization) and not (lazy.usage and f"{name}.weight" not in lazy.usage.touched):
            yield f"{checkpoint.folder / 'config.json'} takes {name} for quantized, which it is not: add it to ignore"


class _SourceComparison:
    """Holds each tensor beside the source's, and each weight's error beside the one that the run recorded."""

    def __init__(
        self, result: Verified, checkpoint: Checkpoint, source: Checkpoint, rescaled: Collection[str] | None
    ) -> None:
        report = reports.read(result.folder) or {}
        recorded, named = report.get("weight_errors"), report.get("rescaled")
        self._recorded: Mapping[str, Any] = recorded if isinstance(recorded, dict) else {}
        if rescaled is None:
            rescaled = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        self._compared = set(source.names()) - set(rescaled)
        self._result, self._checkpoint, self._source = result, checkpoint, source

    def __call__(self, name: str, stored: Tensor | QuantizedWeight) -> list[str]:
        """What is wrong with a tensor, beside the source's of the same name."""
        if name not in self._compared:
            return []
        tensor = compare(self._checkpoint, self._source, name, stored)
        if tensor.error is not None:
            self._result.errors[name] = tensor.error
        if tensor.problem is not None:
            return [tensor.problem]
        recorded = self._recorded.get(name)
        if (
            tensor.error is None
            or not isinstance(recorded, float)
            or math.isclose(recorded, tensor.error, rel_tol=_TOLERANCE)
        ):
            return []
        return [
            f"{self._result.folder}: {name!r} has an error of {tensor.error:.6g}, where the run recorded {recorded:.6g}"
        ]
