"""Commands close the checkpoints that they open."""

from __future__ import annotations

import pytest

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.comparison import experiment
from sarqc.comparison.experiment import Other
from sarqc.entrypoints import compare, evaluate, inspect
from tests.support import tiny


@pytest.mark.parametrize("room", [inspect, evaluate, compare, experiment])
def test_no_file_stays_open(room, tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "llama")
    out = sarqc.quantize(source, tmp_path / "out", method="rtn").out
    opened = []

    def kept(folder):
        opened.append(open_checkpoint(folder))  # what nobody holds would be closed anyway
        return opened[-1]

    monkeypatch.setattr(room, "open_checkpoint", kept)
    if room is inspect:
        inspect.inspect(out)
    elif room is evaluate:
        evaluate.evaluate_and_save(out, seqlen=32, max_windows=1)
    else:
        also = [Other("the run", 4, 64, None, None, out)]
        how = dict(methods=("rtn",), bits=(4,), seqlen=32, num_samples=(1,), eval_seqlen=32, eval_windows=1)
        compare.compare(source, tmp_path / "table", also=also, **how)
    assert opened and all(shard._file.closed for checkpoint in opened for shard in checkpoint._shards)
