"""The exception family of both packages in one place, with the members that only `sarqc` raises."""

from sarqc_kernels.errors import ArgumentError, BackendError, SarqcError

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "Interrupted",
    "ModelError",
    "NumericError",
    "ResourceError",
    "SarqcError",
    "TextError",
    "first_line",
    "opening_line",
    "out_of_memory",
]


class ModelError(SarqcError):
    """A model that cannot be taken: not found, not a causal language model, an architecture we refuse."""


class CheckpointError(SarqcError):
    """A checkpoint file or folder that cannot be trusted, read or written."""


class TextError(SarqcError):
    """Calibration or evaluation text that is missing, empty or too short."""


class NumericError(SarqcError):
    """Numbers that must not be there (NaN, Inf, a matrix without a factor), with the layer they were found in."""


class ResourceError(SarqcError):
    """A machine that cannot hold the job: too little disk or memory, or a work folder that another process uses."""


class Interrupted(SarqcError):
    """A run that stopped on request, with its finished blocks saved; the command line exits with 130."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def opening_line(error: BaseException) -> str:
    """The first of the lines that an error has: torch adds advice and stacks behind it."""
    return str(error).partition("\n")[0]


def out_of_memory(error: Exception) -> bool:
    """Also where the host, or a library of the GPU for its own work, has none: torch has no error of its own there."""
    import torch

    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or any(words in str(error) for words in ("_STATUS_ALLOC_FAILED", "can't allocate memory"))
