"""Fixtures that the room for files has too."""

from tests.checkpoint.conftest import random_weight

__all__ = ["random_weight"]
