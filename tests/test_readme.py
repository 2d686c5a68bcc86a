"""The tables of the README and of docs/ are what the committed results say."""

import pytest

from benchmarks.names import current
from benchmarks.readme import README_HAS, ROOT, SECTIONS, filled, pages

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_come_from_the_committed_results(path):
    before, after = pages()[path]
    assert before == after


@pytest.mark.parametrize("name", sorted(README_HAS))
def test_a_readme_without_a_table_is_refused(name):
    with pytest.raises(SystemExit, match=name):
        filled(README.replace(f"<!-- {name} -->", ""))


def test_every_table_stands_on_a_page():
    text = "".join(after for _, after in pages().values())
    assert all(f"<!-- {name} -->" in text for name in SECTIONS)


def test_results_with_old_names_show_the_new_ones():
    old = {"rows": [{"method": "sarqc", "bits": 3}, {"method": "rtn"}], "protocol": {"tools": {"sarqc": "sarqc 0.2.0"}}}
    new = current(old)
    assert [row["method"] for row in new["rows"]] == ["sarqc-awq-gptq", "rtn"]
    assert new["protocol"]["tools"] == {"sarqc-awq-gptq": "sarqc 0.2.0"}
    assert old["rows"][0]["method"] == "sarqc"


def test_both_commands_stand_before_the_first_section():
    assert max(README.index("make demo"), README.index("make test")) < README.index("\n## ")
