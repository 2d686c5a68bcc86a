"""What tests saw their faults end in: counted where somebody looked, never assumed.

A test marked `fault` takes the fixture `outcomes` and tells it what it saw, once for each trial. One that passes and
told nothing fails (tests/conftest.py); one that fails is counted as lost by `python -m benchmarks.reliability`.
"""

from __future__ import annotations

from collections import Counter

from sarqc.errors import SarqcError

CLEAR, RECOVERED, VALID = "clear error", "recovered run", "still valid"


class Outcomes:
    """counts: trials by what they ended in."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def clear_error(self, error: BaseException | str, trials: int = 1) -> None:
        """The fault ended in this: an error of ours, or the line that somebody was shown."""
        assert isinstance(error, SarqcError | str), repr(error)
        text = str(error)
        assert text and "\n" not in text and "\x1b" not in text and "Traceback" not in text, text
        self.counts[CLEAR] += trials

    def recovered(self, found: object, expected: object, trials: int = 1) -> None:
        """So many faults struck a run that then came to this, where one without them comes to that."""
        assert found == expected, "data was lost"
        self.counts[RECOVERED] += trials

    def still_valid(self) -> None:
        """The change struck nothing that matters, or made another valid file; the reader or the run got through."""
        self.counts[VALID] += 1
