"""The command line in this process."""

from tests.support.command import door

__all__ = ["door"]
