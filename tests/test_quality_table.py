"""What the README shows of a comparison is what its results say."""

import json

import sarqc
from benchmarks import readme
from benchmarks.quality import whole
from benchmarks.quality.proof import FULL, SMALL, markdown
from sarqc.comparison.table import table
from sarqc.config import METHODS
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
    cells += [cell("sarqc-awq-gptq", 0, 11.0), cell("sarqc-awq-gptq", 1, 10.5)]
    shown = markdown(table(protocol, cells) | {"minutes": 5.0, "cpus": 2})
    assert "| wiki.txt | 3 | 64 | 16 | 30.00 | 11.00 ± 1.00 ≈ | **10.75 ± 0.25** |" in shown
    assert "Unquantized: wiki.txt 9.00" in shown and "2 seeds" in shown and "5 minutes on 2 CPU cores" in shown


def test_the_settings_ask_for_methods_that_exist():
    for setting in (*SMALL, *FULL):
        assert set(setting["methods"]) <= METHODS.keys() and len(setting["seeds"]) > 1


def test_tables_of_whole_runs_take_what_they_are_asked_for(tmp_path, monkeypatch):
    def row(method, windows, perplexity, bits=3):
        what = dict(text="wiki.txt", bits=bits, group_size=64, windows=windows, method=method, perplexity=perplexity)
        return what | dict(spread=None, best=False, tied=False, kl=0.25, agreement=0.5)

    rows = [
        row("rtn", 4, 30.0),
        row("rtn", 16, 30.0),
        row("sarqc-awq-gptq", 16, 11.0),
        row("gptq", 4, 20.0),
        row("gptq", 16, 12.0),
    ]
    rows += [row("rtn", 4, 10.0, 4), row("rtn", 16, 10.0, 4), row("gptq", 16, 9.5, 4)]
    protocol = {"model": "x/tiny", "texts": [{"text": "wiki.txt", "perplexity": 9.0}]}
    (tmp_path / "whole-tiny.json").write_text(json.dumps({"rows": rows, "protocol": protocol}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.whole().splitlines() == [
        "| model | bits, group | text | rtn | gptq | sarqc-awq-gptq | unquantized |",
        "|---|---|---|---|---|---|---|",
        "| tiny | 4, 64 | wiki | 10.00 | 9.50 |  | 9.00 |",
        "| tiny | 3, 64 | wiki | 30.00 | 12.00 | 11.00 | 9.00 |",
    ]
    assert readme.amounts().splitlines()[2:] == [
        "| tiny | 3, 64 | wiki | 4 | 30.00 | 20.00 |  | 9.00 |",
        "| tiny | 3, 64 | wiki | 16 | 30.00 | 12.00 | 11.00 | 9.00 |",
    ]
    assert "| tiny | 3, 64 | wiki | 0.250, 50 % | 0.250, 50 % | 0.250, 50 % |" in readme.divergence()


def test_whole_runs_are_made_once_and_judged_beside_rounding(tmp_path, monkeypatch):
    """Of ours; a rival is only another interpreter's checkpoint."""
    model = tiny.save("llama", tmp_path / "model")
    words = (
        f"x {model} {tmp_path}/whole.json --dataset builtin --eval builtin --eval-windows 2 --work-dir {tmp_path}/work"
    )
    words += " --format 3:32 --method gptq --windows 1,2"
    monkeypatch.setattr("sys.argv", f"{words} --seeds 0,1".split())
    monkeypatch.setattr(whole, "SEQLEN", 128)  # the model has 256 positions
    made = []
    quantize = sarqc.quantize
    monkeypatch.setattr(sarqc, "quantize", lambda *args, **options: made.append(args) or quantize(*args, **options))
    whole.main()
    monkeypatch.setattr("sys.argv", f"{words} --seeds 0,1,2 --kept".split())
    whole.main()
    assert len(made) == 4
    content = json.loads((tmp_path / "whole.json").read_text())
    shown = [(row["method"], row["windows"], row["seeds"]) for row in content["rows"]]
    assert sorted(shown) == [("gptq", 1, 2), ("gptq", 2, 2), ("rtn", 1, 1), ("rtn", 2, 1)]
    assert "whole runs" in markdown(content) and content["protocol"]["tools"] == {"gptq": f"sarqc {sarqc.__version__}"}
