"""The tables of the README and of docs/ are what the committed results say, and it stays short."""

import pytest

from benchmarks.readme import ROOT, filled, pages

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_tables_come_from_the_committed_results(path):
    before, after = pages()[path]
    assert before == after


def test_a_readme_without_a_table_is_refused():
    with pytest.raises(SystemExit, match="no markers for 'speed'"):
        filled(README.replace("<!-- speed -->", ""))


def test_it_shows_both_commands_first_and_stays_short():
    assert README.index("make demo") < README.index("make test") < README.index("## ")
    assert len(README.splitlines()) < 200
