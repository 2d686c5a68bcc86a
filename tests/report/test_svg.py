"""Charts: where marks land, what ticks say, and that foreign text stays text."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from sarqc.report.svg import (
    WIDTH,
    Axes,
    Ranked,
    Scale,
    Series,
    line_chart,
    range_chart,
    ranked_chart,
    sheet,
    short,
    stacked_bars,
    text,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</svg><script>alert(1)</script> & "quoted" \x00\x1b[31m\ud800\u202e'


def parsed(chart: str) -> ElementTree.Element:
    chart.encode("utf-8")
    return ElementTree.fromstring(chart)


def test_scales_put_ends_at_ends_and_the_middle_between():
    assert [Scale(0, 10, 100, 200)(v) for v in (0, 5, 10)] == [100, 150, 200]
    log = Scale(0.01, 1, 300, 100, "log")
    assert [round(log(v)) for v in (0.01, 0.1, 1)] == [300, 200, 100]
    count = Scale(0, 999, 0, 300, "count")
    assert count(0) == 0 and count(9) == pytest.approx(100) and count(999) == pytest.approx(300)
    assert Scale(3, 3, 0, 10)(3) == 5


def test_ticks_are_round_and_inside():
    assert Scale(0, 10, 0, 1).ticks() == [0, 2, 4, 6, 8, 10]
    assert Scale(0.1, 1, 0, 1, "log").ticks() == pytest.approx([0.1, 0.2, 0.5, 1])
    assert Scale(1e-6, 1, 0, 1, "log").ticks() == pytest.approx([1e-6, 1e-4, 1e-2, 1])
    assert Scale(0, 5000, 0, 1, "count").ticks() == [0, 1, 10, 100, 1000]
    for scale in (Scale(0.37, 0.41, 0, 1, "log"), Scale(-3, 17, 0, 1), Scale(0.5, 0.5, 0, 1)):
        assert all(scale.low <= tick <= scale.high for tick in scale.ticks())


@pytest.mark.parametrize(
    ("value", "expected"), [(0.00312, "0.00312"), (18000, "18 k"), (2.5e9, "2.5 G"), (math.nan, "?")]
)
def test_short_numbers(value, expected):
    assert short(value) == expected


def test_a_line_breaks_where_a_number_is_missing():
    points = tuple((x, y, f"at {x}") for x, y in enumerate((1.0, 2.0, math.nan, 0.0, 4.0, 8.0)))
    chart = parsed(line_chart([Series("a", points)], Axes("x", "y", "log")))
    assert [len(line.get("points").split()) for line in chart.iter(f"{SVG}polyline")] == [2, 2]
    circles = list(chart.iter(f"{SVG}circle"))
    assert [circle.find(f"{SVG}title").text for circle in circles] == ["at 0", "at 1", "at 4", "at 5"]
    heights = [float(circle.get("cy")) for circle in circles]
    # Equal factors are equal distances on a log axis, and larger is higher up.
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[3]) / 3, abs=0.2)
    assert line_chart([Series("a", ((0, math.inf, ""),))], Axes("x", "y")) == ""


def test_marks_stay_inside_the_drawing():
    series = [Series(f"kind {i}", tuple((x, 10.0 ** (i - x), "") for x in range(9))) for i in range(11)]
    spans = [Series("s", ((0.0, 5.0, ""), (64.0, 6.0, "")), ((0.0, 1.0, 9.0),))]
    charts = [
        line_chart(series, Axes("x", "y", "log"), mark=(1.0, "one")),
        line_chart(spans, Axes("x", "y")),
        range_chart([(0, 0, 5, 900, ""), (1, 3, 4, 5, "")], Axes("x", "y")),
        stacked_bars([(0, (1.0, 2.0)), (1, (0.0, 9.0))], ("a", "b"), Axes("x", "y")),
        ranked_chart([Ranked("a", 3.0, "3", (2.0, 900.0)), Ranked("b", 1e6, "1 M")], "x", mark=(0.1, "m"), title="t"),
    ]
    for chart in map(parsed, charts):
        width, height = float(chart.get("width")), float(chart.get("height"))
        for mark in chart.iter():
            for name, limit in (("x1", width), ("x2", width), ("cx", width), ("y1", height), ("y2", height)):
                assert 0 <= float(mark.get(name, 0)) <= limit, (mark.tag, mark.attrib)
            assert not mark.tag.endswith("circle") or 0 <= float(mark.get("cy")) <= height


def test_stacked_parts_add_up():
    chart = parsed(stacked_bars([(0, (1.0, 3.0))], ("low", "high"), Axes("block", "s")))
    low, high = chart.iter(f"{SVG}rect")
    assert float(high.get("height")) == pytest.approx(3 * float(low.get("height")), abs=0.3)
    assert float(high.get("y")) + float(high.get("height")) == pytest.approx(float(low.get("y")), abs=0.2)


def test_foreign_text_is_text_and_files_are_xml():
    series = [Series(HOSTILE, ((0, 1.0, HOSTILE), (1, 2.0, HOSTILE)))]
    chart = line_chart(series, Axes(HOSTILE, HOSTILE), mark=(1.0, HOSTILE), title=HOSTILE)
    both = parsed(sheet([chart, chart, chart], columns=2))
    assert not any(element.tag.endswith("script") for element in both.iter())
    one = parsed(chart)
    assert (float(both.get("width")), float(both.get("height"))) == (2 * WIDTH, 2 * float(one.get("height")))
    assert len(list(both.iter(f"{SVG}svg"))) == 4
    assert text("a\u202eb\x07") == "a b "


def test_ranked_rows_say_how_far_they_are_from_the_mark():
    rows = [
        Ranked("a", 20.0, "20.00 ± 0.10", (19.9, 20.1)),
        Ranked("b", 40.0, "40", best=True),
        Ranked("c", math.nan, ""),
    ]
    chart = parsed(ranked_chart(rows, "perplexity", mark=(10.0, "unquantized"), title="text, 4 bits"))
    at = [float(circle.get("cx")) for circle in chart.iter(f"{SVG}circle")]
    (mark,) = (float(line.get("x1")) for line in chart.iter(f"{SVG}line") if line.get("class") == "mark")
    assert at[1] - at[0] == pytest.approx(at[0] - mark, abs=0.2)  # equal factors
    assert chart.get("aria-label") == "text, 4 bits: perplexity. unquantized 10, a 20.00 ± 0.10, b 40"
    assert ranked_chart([Ranked("c", math.nan, "")], "x", mark=(1.0, "m")) == ""
