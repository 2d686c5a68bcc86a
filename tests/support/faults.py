"""What tests saw their faults end in: counted where somebody looked, never assumed.

A test marked `fault` takes the fixture `outcomes` and tells it what it saw, once for each trial. One that passes and
told nothing fails (tests/conftest.py); one that fails is counted as lost by `python -m benchmarks.reliability`.
"""

from __future__ import annotations

from sarqc.errors import SarqcError

CLEAR, RECOVERED, VALID = "clear error", "recovered run", "still valid"


class Outcomes:
    """counts: trials by what they ended in."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # a plain one: it travels between pytest's processes

    def clear_error(self, error: BaseException | str, trials: int = 1) -> None:
        """The fault ended in this: an error of ours, or the line that somebody was shown."""
        assert isinstance(error, SarqcError | str), repr(error)
        text = str(error)
        assert text and "\n" not in text and "\x1b" not in text and "Traceback" not in text, text
        self._count(CLEAR, trials)

    def recovered(self, actual: object, expected: object, trials: int = 1) -> None:
        """So many faults struck a run that then came to this, where one without them comes to that."""
        assert actual == expected, "data was lost"
        self._count(RECOVERED, trials)

    def still_valid(self) -> None:
        """The change struck nothing that matters, or made another valid file; the reader or the run got through."""
        self._count(VALID, 1)

    def _count(self, ending: str, trials: int) -> None:
        self.counts[ending] = self.counts.get(ending, 0) + trials
