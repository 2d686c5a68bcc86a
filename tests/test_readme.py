"""The README's tables are what the committed results say, and it stays short."""

from benchmarks.readme import ROOT, filled

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_committed_results():
    assert filled(README) == README


def test_it_shows_both_commands_first_and_stays_short():
    assert README.index("make demo") < README.index("make test") < README.index("## ")
    assert len(README.splitlines()) < 200
