"""Zero-shot accuracy through lm-eval's Python interface: its own tasks by name, and `cloze`, which needs no hub.

`cloze` asks for the last word of a paragraph, given the rest of it (as LAMBADA does, arXiv 1606.06031), of a text that
the caller chooses. Like perplexity it is judged on every model alike; unlike perplexity it counts answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sarqc.errors import ArgumentError, TextError
from sarqc.model.calibration_data import read_text

CLOZE = "cloze"
CLOZE_WORDS = 12
"""Least words before the one that is asked for."""
_INSTALL = "pip install lm-eval"


def last_words(text: str) -> list[dict[str, str]]:
    """The questions in a text: {"context", "word"} for each paragraph that ends in a word of letters and a full stop.

    A paragraph is what stands between empty lines; a word has three letters at least, so that it says something.
    """
    items = []
    for paragraph in re.split(r"\n\s*\n", text):
        ended = re.fullmatch(r"(.*\s)?([A-Za-z]{3,})[.!?]", " ".join(paragraph.split()))
        if ended and len((ended.group(1) or "").split()) >= CLOZE_WORDS:
            items.append({"context": ended.group(1).rstrip(), "word": ended.group(2)})
    return items


def zero_shot(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, text: str, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics by task, as lm-eval names them without its filter ("acc", "acc_stderr"), of a transformers model.

    tasks: names of lm-eval, whose data sets come from a hub, or `cloze`, made from `text` (as in `windows`). limit: the
    first `limit` questions of each. Raises `ArgumentError` where lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ArgumentError(f"tasks = {','.join(tasks)} needs lm-eval, which is not installed: {_INSTALL}") from error
    manager = TaskManager()
    known = {CLOZE, *manager.all_tasks}
    for task in tasks:
        if task not in known:
            raise ArgumentError(f"tasks: lm-eval has no task {task!r}, and it is not {CLOZE!r}; see `lm-eval ls tasks`")
    asked = [_cloze(text) if task == CLOZE else task for task in tasks]
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=asked,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        # Its defaults would set the process's random seeds; what is asked here draws nothing.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=None,
    )
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _cloze(text: str) -> dict[str, Any]:
    questions = last_words(read_text(text, "evaluation"))
    if not questions:
        raise TextError(f"text {text!r} has no paragraph of {CLOZE_WORDS} words that ends in a word and a full stop")

    from datasets import Dataset

    def data(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list(questions)}

    return {
        "task": CLOZE,
        "custom_dataset": data,
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",  # lm-eval puts no space between a context and what it asks for
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics without the filter's name behind the comma; what is no number ("alias", a missing error) is left out."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
