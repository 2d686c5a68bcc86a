"""The pages in a real browser: no error, nothing fetched, readable on a telephone and in the dark."""

from __future__ import annotations

import pytest

import sarqc
from sarqc.comparison.page import page as comparison_page
from sarqc.report import report
from sarqc.report.page import page
from tests.support import tiny
from tests.support.browser import CHROMIUM, measure

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome is installed")

CONTRAST = 4.5
"""The least of text of this size by WCAG 2, level AA."""


def comparison(sizes):
    methods = ("rtn", "gptq", "sarqc-gptq", "sarqc-awq-gptq@0.3")
    texts = [{"text": "wiki text.txt", "windows": 16, "seqlen": 512, "perplexity": 25.39}]
    rows = [
        {
            "text": "wiki text.txt", "bits": bits, "group_size": 64, "windows": size, "method": method, "seeds": 3,
            "perplexity": value, "spread": value / 50, "lowest": 0.98 * value, "highest": 1.02 * value,
            "agreement": 0.9, "kl": 0.1, "seconds": 12.5, "best": method == "sarqc-gptq", "tied": method == "gptq",
        }
        for bits in (4, 3)
        for size in sizes
        for number, method in enumerate(methods)
        for value in [26.0 + 1_500_000.0 * (number == 0) / size + number]
    ]  # fmt: skip
    protocol = {
        "model": "owner/name-of-a-model", "mode": "whole runs", "calibration": {"text": "builtin", "seqlen": 512},
        "texts": texts, "dtype": "float32", "device": "cpu", "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return comparison_page({"protocol": protocol, "rows": rows, "cells": []})


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    source = tiny.save("qwen3_moe", folder / "moe")
    result = report.load(sarqc.quantize(source, folder / "out", num_samples=8, seqlen=64, group_size=32).out)
    result["quality"] = [{"text": "x" * 90, "windows": 4, "seqlen": 64, "before": 9.0, "after": 9.5, "kl": 0.1}]
    for number, each in enumerate(result["sites"]):
        each["reg_lambda"] = 0.1 * (1 + number % 3)
        each["bits"] = 3 + number % 2
    return {"report": page(result), "one size": comparison((16,)), "sizes": comparison((4, 16))}


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (400, False), (400, True)])
@pytest.mark.parametrize("name", ["report", "one size", "sizes"])
def test_a_page_is_readable_and_asks_for_nothing(pages, name, width, dark):
    result = measure(pages[name], width, dark=dark)
    assert (result["width"], result["dark"], result["errors"], result["requests"]) == (width, dark, [], [])
    assert result["scrolls"] <= width, "it has to be scrolled sideways"
    assert result["contrast"][0] >= CONTRAST, result["contrast"]
    assert result["smallest"][0] >= 9, result["smallest"]
    assert result["cut"] == []
    assert result["figures"] == len(result["named"]) > 1 and all(result["named"])


def test_what_the_browser_finds_wrong_is_found(pages):
    """The measurements themselves: each of them sees a page that is wrong in that way."""
    bad = pages["one size"].replace(
        "</header>", '</header><p style="width:900px;color:#eee">wide</p><img src="http://a/">'
    )
    bad = bad.replace('<circle cx="', '<text x="999" y="5">cut</text><circle cx="', 1).replace("<script", "")
    bad = bad.replace("<body>", "<body><script>nothing.there()</script>")
    result = measure(bad, 400)
    assert result["scrolls"] > 400 and result["contrast"][0] < 2 and "cut" in result["cut"]
    assert any("nothing" in error for error in result["errors"]) and result["requests"] == ["http://a/"]
