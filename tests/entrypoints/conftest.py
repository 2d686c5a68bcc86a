"""The command line in this process, and random quantized weights."""

from tests.checkpoint.conftest import random_weight
from tests.support.command import door

__all__ = ["door", "random_weight"]
