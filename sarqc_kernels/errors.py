"""The one exception family: every error this project raises on purpose descends from `SarqcError`.

A message names the argument, its value, what is accepted, and the way out, on one line: it is what a person reads
in the terminal. Anything that is not a `SarqcError` is a defect of ours.
"""


class SarqcError(Exception):
    """Root of the family; the command line turns it into one line on stderr and exit code 2."""


class ArgumentError(SarqcError, ValueError):
    """An argument outside its contract."""


class BackendError(SarqcError, RuntimeError):
    """A backend that was named cannot run this call; the message has its reason."""
