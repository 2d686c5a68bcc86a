"""Zero-shot questions: which ones a text holds, and what lm-eval is asked and answers. A stand-in takes its place."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from jinja2 import Template

from sarqc.errors import ArgumentError, TextError
from sarqc.model.dataset import builtin_text
from sarqc.model.lm_eval import last_words, zero_shot

TWELVE = "one two three four five six seven eight nine ten eleven twelve"


def test_questions_are_paragraphs_that_end_in_a_word():
    text = f"{TWELVE}\nthirteen.\n\ntoo short.\n\n{TWELVE} f().\n\n{TWELVE} no\n\n{TWELVE} it.\n\n{TWELVE} end!\n"
    assert last_words(text) == [{"context": TWELVE, "word": "thirteen"}, {"context": TWELVE, "word": "end"}]
    assert len(last_words(builtin_text("evaluation"))) > 100
    assert last_words("") == last_words("...") == last_words("word.") == []


@pytest.fixture
def lm_eval(monkeypatch):
    """What we use of lm-eval 0.4, keeping what it is asked."""
    pytest.importorskip("datasets", reason="datasets comes with lm-eval, which is not installed")
    asked = SimpleNamespace()

    def simple_evaluate(**how):
        vars(asked).update(how)
        asked.questions = how["tasks"][0]["custom_dataset"](version=1)["test"] if how["tasks"] != ["arc_easy"] else None
        return {"results": {"cloze": {"alias": "cloze", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 4}}}

    parts = {
        "lm_eval": dict(simple_evaluate=simple_evaluate),
        "lm_eval.models": {},
        "lm_eval.models.huggingface": dict(HFLM=lambda **how: how),
        "lm_eval.tasks": dict(TaskManager=lambda: SimpleNamespace(all_tasks=["arc_easy"])),
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_cloze_is_made_from_the_text_and_names_lose_their_filter(lm_eval, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text(f"{TWELVE} thirteen.")
    assert zero_shot("model", "tokenizer", ["cloze"], text=str(text), limit=3) == {
        "cloze": {"acc": 0.25, "sample_len": 4}
    }
    assert lm_eval.questions[0] == {"context": TWELVE, "word": "thirteen"} and lm_eval.limit == 3
    parts = [lm_eval.tasks[0][part] for part in ("doc_to_text", "doc_to_target")]
    asked = "".join(Template(part).render(lm_eval.questions[0]) for part in parts)
    assert asked == f"{TWELVE} thirteen"  # lm-eval itself puts nothing between them
    assert lm_eval.model["pretrained"] == "model"
    seeds = [lm_eval.random_seed, lm_eval.numpy_random_seed, lm_eval.torch_random_seed, lm_eval.fewshot_random_seed]
    assert seeds == [None] * 4
    zero_shot("model", "tokenizer", ["arc_easy"], text="unread")
    assert lm_eval.tasks == ["arc_easy"]


def test_unknown_tasks_and_empty_texts_are_refused(lm_eval, tmp_path):
    (tmp_path / "t.txt").write_text("nothing to ask")
    with pytest.raises(ArgumentError, match="arc_hard"):
        zero_shot("model", "tokenizer", ["cloze", "arc_hard"], text="builtin")
    with pytest.raises(TextError, match="no paragraph"):
        zero_shot("model", "tokenizer", ["cloze"], text=str(tmp_path / "t.txt"))


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ArgumentError, match="pip install lm-eval"):
        zero_shot("model", "tokenizer", ["cloze"], text="builtin")
