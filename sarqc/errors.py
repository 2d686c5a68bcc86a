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
    """A run that was asked to stop and did, with its finished blocks saved; the command line exits with 130."""
