"""What the README shows of a comparison is what its results say."""

import json

import sarqc
from benchmarks.quality import whole
from benchmarks.quality.proof import FULL, SMALL, markdown
from sarqc.job.comparison.table import table
from sarqc.spec import METHODS
from tests.support import tiny


def test_the_readme_table_names_best_ties_and_spread():
    def cell(method, seed, perplexity, windows=16):
        quality = {"a/wiki.txt": {"perplexity": perplexity, "agreement": 0.5, "kl": 0.1}}
        what = dict(method=method, bits=3, group_size=64, windows=windows, seed=seed, error=0.1, failed=None)
        return what | {"quality": quality, "seconds": {"solve": 1.0, "total": 60.0}}

    protocol = {
        "model": "x/smollm2",
        "mode": "one-shot",
        "calibration": {"text": "builtin", "seqlen": 512},
        "texts": [{"text": "a/wiki.txt", "perplexity": 9.0}],
    }
    cells = [cell("rtn", None, 30.0, None), cell("gptq", 0, 12.0), cell("gptq", 1, 10.0)]
    cells += [cell("sarqc", 0, 11.0), cell("sarqc", 1, 10.5)]
    shown = markdown(table(protocol, cells) | {"minutes": 5.0, "cpus": 2})
    assert "| wiki.txt | 3 | 64 | 16 | 30.00 | 11.00 ± 1.00 ≈ | **10.75 ± 0.25** |" in shown
    assert "Unquantized: wiki.txt 9.00" in shown and "2 seeds" in shown and "5 minutes on 2 CPU cores" in shown


def test_the_settings_ask_for_methods_that_exist():
    for setting in (*SMALL, *FULL):
        assert set(setting["methods"]) <= METHODS.keys() and len(setting["seeds"]) > 1


def test_whole_runs_are_made_once_and_judged_beside_rounding(tmp_path, monkeypatch):
    """Of ours; a rival is only another interpreter's checkpoint."""
    model = tiny.save("llama", tmp_path / "model")
    words = f"x {model} {tmp_path}/whole.json --calib builtin --eval builtin --eval-windows 2 --work {tmp_path}/work"
    words += " --format 3:32 --method gptq --windows 2 --seeds 0,1"
    monkeypatch.setattr("sys.argv", words.split())
    made = []
    quantize = sarqc.quantize
    monkeypatch.setattr(sarqc, "quantize", lambda *args, **options: made.append(args) or quantize(*args, **options))
    for _ in range(2):
        whole.main()
        assert len(made) == 2
    found = json.loads((tmp_path / "whole.json").read_text())
    assert {row["method"]: row["seeds"] for row in found["rows"]} == {"rtn": 1, "gptq": 2}
    assert "whole runs" in markdown(found) and found["protocol"]["tools"] == {"gptq": f"sarqc {sarqc.__version__}"}
