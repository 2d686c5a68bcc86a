"""What several threads must not call first is called once alone, before a model is built."""

from __future__ import annotations

import torch

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.model import first_calls, skeleton
from tests.support import tiny


def test_each_function_is_called_alone_on_one_element(monkeypatch):
    seen = []
    monkeypatch.setattr(first_calls, "FUNCTIONS", (seen.append,))
    first_calls.settle.__wrapped__()
    assert [(one.numel(), one.dtype) for one in seen] == [(1, torch.float32), (1, torch.float64)]


def test_a_skeleton_settles_them_before_it_computes(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path)
    calls = []
    monkeypatch.setattr(skeleton, "settle", lambda: calls.append("settle"))
    monkeypatch.setattr(skeleton, "trace", lambda *_: calls.append("trace") or {})
    with open_checkpoint(folder) as checkpoint:
        skeleton.Skeleton.from_folder(folder, checkpoint)
    assert calls == ["settle", "trace"]
