"""The page and the card: right for good runs and bad ones, safe for foreign text, and made again from report.json."""

from __future__ import annotations

import copy
import json
import platform
import re
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError
from io import StringIO

import pytest
from rich.console import Console

import sarqc
from sarqc import system
from sarqc.cli.summary import run_summary
from sarqc.config import MethodConfig
from sarqc.errors import CheckpointError
from sarqc.options import record
from sarqc.report import model_card, report, summary
from sarqc.report.page import page
from tests.support import tiny

HOSTILE = '</title><script>alert("1")</script>`` ``` |x| [a](b) <img src=x> \x00\n# not a heading\ud800'
VOID = {"meta"}


class Outline(HTMLParser):
    """Tags, and whether each was closed where it was opened."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny.save("qwen3_moe", tmp_path_factory.mktemp("models") / "moe")
    front = "---\nlicense: other\nlicense_name: 'qwen-research'\nbase_model: a/b\ntags: [x]\n---\n# Great model\n"
    (folder / "README.md").write_text(front)
    return folder


@pytest.fixture(scope="module")
def out(source, tmp_path_factory):
    return sarqc.quantize(source, tmp_path_factory.mktemp("out") / "out", num_samples=8, seqlen=64).out


@pytest.fixture
def loaded(out):
    return copy.deepcopy(report.load(out))


def site(name, rows=(100,), error=0.01, plain=0.02, reg_lambda=0.3):
    return dict(site=name, rows=list(rows), error=error, rtn_error=plain, reg_lambda=reg_lambda, damping=0.0)


def test_a_run_leaves_a_page_and_a_card(out, loaded):
    shown = Outline((out / "report.html").read_text())
    words = " ".join(shown.text)
    assert shown.links == [] and "script" not in shown.tags and shown.tags.count("svg") == 6
    assert "It went well" in words and "Left unquantized" in words and "model.layers.*.mlp.gate" in words
    stored = sum(path.stat().st_size for path in out.parent.rglob("*.safetensors"))
    assert loaded["source"]["bytes"] > stored
    assert loaded["source"]["license_name"] == "qwen-research"
    assert [block["index"] for block in loaded["blocks"]] == [0, 1]
    for stage in ("load", "forward", "solve"):
        spent = sum(block["seconds"][stage] for block in loaded["blocks"])
        assert spent == pytest.approx(loaded["seconds"][stage], abs=0.003)


def test_the_card_says_what_was_done_and_claims_nothing_else(source, out, loaded):
    written = (out / "README.md").read_text()
    front = written.split("---\n")[1]
    assert "license: other" in front and "qwen-research" in front and "base_model:" not in front
    assert "AutoModelForCausalLM" in written and "Great model" not in written
    assert "--num-samples 8 --seqlen 64 --seed 0" in written and str(source.parent) not in written
    assert "perplexity" not in written.lower()
    loaded["model"] = "Qwen/Qwen3-8B"
    front = model_card.card(loaded).split("---\n")[1]
    assert "base_model: Qwen/Qwen3-8B" in front and "base_model_relation: quantized" in front


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("no front matter\nlicense: mit\n", {}),
        ("---\nlicense: [a, b]\nlicense_link: https://x.y/z\n---\n", {"license_link": "https://x.y/z"}),
        ("---\nlicense: !!python/object:os.system\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_of_the_originals_card_only_the_licence_is_taken(tmp_path, front, expected):
    (tmp_path / "README.md").write_bytes(front.encode())
    assert model_card.licence(tmp_path) == expected


def test_a_card_that_is_no_text_or_not_there_states_nothing(tmp_path):
    assert model_card.licence(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert model_card.licence(tmp_path) == {}


def test_the_command_has_the_effort_and_what_differs_from_it(loaded):
    fast = record(MethodConfig(effort="fast", cd_passes=1))
    words = model_card.command(loaded | {"effort": "fast", "method": fast}).split()
    assert words[words.index("--effort") + 1] == "fast" and "--reg-lambda" not in words
    assert words[words.index("--cd-passes") + 1] == "1" and "--effort" not in model_card.command(loaded)
    assert "effort fast, lambda prior" in model_card.card(loaded | {"effort": "fast", "method": fast})
    assert "--effort" not in model_card.command(loaded | {"effort": "edited by hand"})


def test_the_command_repeats_the_run(source, loaded, tmp_path):
    loaded["method"]["reg_lambda"], loaded["quant"]["sym"] = 0.5, False
    loaded["quant"]["ignore"] = ["o_proj$", "it's"]
    line = model_card.command(loaded)
    assert " --seed 0" in line and " --ignore 'o_proj$' --ignore 'it'\"'\"'s' " in line
    assert " --asym " in line and " --reg-lambda 0.5 " in line and "--saliency" not in line
    for text, shown in (
        ("/data/my/calib.txt", "calib.txt"),
        ("Salesforce/wikitext:wikitext-2-raw-v1:train", "Salesforce/wikitext:wikitext-2-raw-v1:train"),
        ("builtin", "builtin"),
        ("given tokens", "YOUR_DATA"),
    ):
        loaded["calibration"]["text"] = text
        assert f" --dataset {shown} " in model_card.command(loaded)
        written = model_card.card(loaded)
        assert ("YOUR_DATA stands for given tokens" in written) is (text == "given tokens")
        assert f"tokens of {text if shown == 'YOUR_DATA' else shown} (sha256" in written


def test_what_calls_for_a_look_is_said_where_the_run_ends(loaded, out):
    def shown():
        printed = StringIO()
        Console(file=printed, width=200).print(run_summary(out, loaded))
        return printed.getvalue()

    assert "look closer" not in shown()
    loaded["fallbacks"] = {"model.layers.0.mlp.down_proj": "no factor"}
    assert re.search(r"look closer +1 site fell back to RTN", shown())


def test_the_card_loads_with_what_transformers_needs(loaded):
    assert "import sarqc" not in model_card.card(loaded)
    loaded["quant"]["sym"] = False
    assert "import sarqc  # so that transformers reads it\nfrom transformers import" in model_card.card(loaded)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0000123, "0.00123%"), (0.01012, "1.01%"), (0.25, "25%"), (0.0, "0%"), (12.3456, "1235%")]
)
def test_small_errors_keep_their_digits(value, text):
    assert summary.share(value) == text


def test_hostile_names_stay_text(loaded):
    loaded["model"] = f"folder/{HOSTILE}"
    loaded["sites"] = [site(f"model.layers.{i}.{HOSTILE}") for i in range(3)]
    loaded["fallbacks"] = {HOSTILE: HOSTILE}
    loaded["calibration"]["text"] = HOSTILE
    loaded["targets"] |= {"untouched": [HOSTILE], "ignored": {HOSTILE: HOSTILE}}
    loaded["versions"] = {HOSTILE: HOSTILE}
    loaded["source"]["license"] = HOSTILE.replace("\ud800", "")
    loaded["quality"] = [{"text": HOSTILE, "before": 10.0, "after": 11.0}]
    shown = Outline(page(loaded))
    assert "script" not in shown.tags and "img" not in shown.tags and shown.links == []
    page(loaded).encode(), model_card.card(loaded).encode()
    lines = model_card.card(loaded).splitlines()
    assert not any(line.startswith("# not") for line in lines)
    outside = [part for at, part in enumerate(model_card.card(loaded).split("\n````")) if at % 2 == 0]
    assert "<script" not in "".join(outside) and "<img" not in "".join(outside)


def test_names_fall_into_blocks_and_kinds():
    assert summary.place("model.layers.3.mlp.experts.7.w1[0:8]") == (3, "mlp.experts.w1")
    assert summary.place("transformer.h.11.attn.c_proj") == (11, "attn.c_proj")
    assert summary.place("lm_head") == (None, "lm_head")
    assert summary.place("") == (None, "")


def test_tokens_per_expert_join_the_parts_of_a_layer(loaded):
    loaded["sites"] = [
        site("model.layers.0.mlp.experts.0.up[0:2]", rows=(0, 100)),
        site("model.layers.0.mlp.experts.0.up[2:4]", rows=(9, 120)),
        site("model.layers.0.mlp.experts.0.down", rows=(0, 100, 9, 120)),
        site("model.layers.1.mlp.experts.0.up", rows=(50, 60, 70, 80)),
        site("model.layers.1.self_attn.q_proj", rows=(400,)),
    ]
    first, second = summary.loads(loaded)
    assert first.rows == (0, 100, 9, 120) and first.median == 54.5 and first.starved == ((0, 0),)
    assert second.starved == ()
    assert "received no token" in " ".join(summary.verdict(loaded).concerns)
    assert "block 0: expert 0 (0 tokens)" in page(loaded)


def test_the_verdict_names_what_calls_for_a_look(loaded):
    assert summary.verdict(loaded).good
    loaded["fallbacks"] = {"a": "why"}
    loaded["sites"][0] |= {"error": 0.5, "rtn_error": 0.1}
    loaded["quality"] = [{"text": "t", "before": 10.0, "after": 20.0}]
    verdict = summary.verdict(loaded)
    assert not verdict.good and len(verdict.concerns) == 3
    assert loaded["sites"][0]["site"] in " ".join(verdict.concerns) and "10.00 → 20.00" in verdict.sentence
    assert summary.worst(loaded)[0].name == loaded["sites"][0]["site"]


def test_our_own_version_is_that_of_the_code_not_of_what_pip_wrote_down(monkeypatch):
    def stale(package):
        if package == "torch":
            return "1.0"
        raise PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", stale)
    assert system.versions() == {"python": platform.python_version(), "sarqc": sarqc.__version__, "torch": "1.0"}


def test_a_constant_is_told_and_not_drawn(loaded):
    """One lambda in all layers is a sentence."""
    for each in loaded["sites"]:
        each["reg_lambda"] = 0.3
    shown = page(loaded)
    assert "It is 0.3 in all" in shown and 'aria-label="lambda' not in shown
    loaded["sites"][0]["reg_lambda"] = 1.0
    assert 'aria-label="lambda by block, from 0.3 to 1' in page(loaded)


def test_error_correction_is_drawn_where_layers_did_it(loaded):
    loaded["sites"] = [site | {"correction_share": 0.0} for site in loaded["sites"]]
    assert "Residual error correction" not in page(loaded)
    loaded["sites"] = [
        site(f"model.layers.{index}.mlp.down_proj") | {"correction_share": index / 10} for index in range(4)
    ]
    shown = " ".join(Outline(page(loaded)).text)
    assert "Residual error correction" in shown and "layers.3.mlp.down_proj: share 0.30" in shown
    assert "layers.0.mlp.down_proj: share" not in shown


def test_an_older_report_and_one_without_text_are_shown(loaded):
    for key in ("blocks", "source"):
        loaded.pop(key)
    loaded |= {"calibration": None, "sites": [site("model.layers.0.x", rows=(), reg_lambda=0.0)]}
    shown = " ".join(Outline(page(loaded)).text)
    assert "without calibration" in shown and "How strongly" not in shown
    assert "no calibration text" in model_card.card(loaded)


def test_the_page_is_made_again_from_the_json_alone(out, tmp_path):
    (tmp_path / "report.json").write_bytes((out / "report.json").read_bytes())
    assert report.rebuild(tmp_path).read_bytes() == (out / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("sites"), "'sites'"),
        (lambda r: r["size"].pop("bytes"), "'bytes'"),
        (lambda r: r["sites"][1].update(error="much"), r"sites\[1\].*'error'"),
        (lambda r: r["sites"][1].update(correction_share="half"), r"sites\[1\].*'correction_share'"),
        (lambda r: r["sites"][1].update(damping="much"), r"sites\[1\].*'damping'"),
        (lambda r: r["versions"].update(torch=2), "'versions'"),
        (lambda r: r.update(effort=["best"]), "'effort'"),
        (lambda r: r["sites"].append(3), "no mapping"),
        (lambda r: r.update(error=float("nan")), "'error'"),
        (lambda r: r.update(quality=[{"text": "t", "after": -1}]), "'after'"),
        (lambda r: r.update(blocks=7), "'blocks'"),
        (lambda r: r.update(source=[]), "'source'"),
        (lambda r: r["targets"].update(untouched=[1]), "'targets'"),
    ],
)
def test_a_report_that_was_bent_is_one_error(loaded, tmp_path, change, message):
    change(loaded)
    (tmp_path / "report.json").write_text(json.dumps(loaded))
    with pytest.raises(CheckpointError, match=message):
        report.rebuild(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_grown_report_renews_the_card_but_not_over_somebodys_words(out, loaded, tmp_path):
    report.write(tmp_path, loaded)
    loaded["quality"] = [{"text": "wiki.txt", "windows": 2, "seqlen": 64, "before": 10.0, "after": 10.5}]
    assert report.write(tmp_path, loaded)
    assert "| wiki.txt | 2 of 64 | 10.000 | 10.500 |" in (tmp_path / "README.md").read_text()
    assert "perplexity 10.00 → 10.50" in (tmp_path / "report.html").read_text()
    (tmp_path / "README.md").write_text("my own words")
    loaded["quality"][0]["after"] = 11.0
    assert not report.write(tmp_path, loaded)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert report.load(tmp_path)["quality"][0]["after"] == 11.0


def test_the_card_sends_nobody_to_a_server_that_refuses(loaded):
    assert loaded["format"] == "compressed-tensors" and "--format" not in model_card.command(loaded)
    assert loaded["serve"]["transformers 5.23"] == [1]
    loaded["serve"] = {"vLLM 0.33, sm_80": [], "vLLM 0.33, sm_90": [1, 2], "SGLang 0.5.23": []}
    half = model_card.card(loaded)
    assert "vllm serve ." in half and "vLLM has" not in half
    assert "sglang.launch_server" not in half and "SGLang has no kernels for all of its layers" in half
    loaded["serve"] = {"vLLM 0.33, sm_80": None}
    assert "vllm serve ." in model_card.card(loaded) and "Kernels of vLLM were not checked" in model_card.card(loaded)
    loaded["quant"]["sym"] = False
    assert "transformers needs `import sarqc`" in model_card.card(loaded)
    loaded["format"] = "gptq"
    assert "- gptq\n" in model_card.card(loaded) and "`gptqmodel`" in model_card.card(loaded)
    assert "--format gptq" in model_card.command(loaded)
