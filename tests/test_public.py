"""The Python interface: what is public is there, typed, and takes what it says."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import sarqc
import sarqc_kernels
from sarqc.config import QUANTIZE
from sarqc.config_compare import COMPARE, EVALUATE
from sarqc.errors import ArgumentError, Interrupted, ModelError
from sarqc.method.layer import SOLVERS
from sarqc.methods import METHODS
from sarqc.options import RenamedWarning, options
from tests.support import tiny
from tests.support.stopping import Stopping

SMALL = {"num_samples": 4, "seqlen": 32, "group_size": 32}


@pytest.mark.parametrize("package", [sarqc, sarqc_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_documented(package):
    for name in package.__all__:
        value = getattr(package, name)
        assert isinstance(value, dict | str) or (value.__doc__ or "").strip(), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


CANNOT_FAIL = ("register", "unregister", "progress_bar", "warm_up")


@pytest.mark.parametrize("package", [sarqc, sarqc_kernels], ids=lambda package: package.__name__)
def test_docstrings_say_what_goes_in_what_comes_out_and_what_is_refused(package):
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value):
            check_class(value)
        elif callable(value):
            doc, signature = inspect.getdoc(value) or "", inspect.signature(value)
            assert not signature.parameters or "\nArgs:\n" in doc, name
            entries = doc.partition("\nArgs:\n")[2]
            assert [one for one in signature.parameters if f"    {one}: " not in entries.replace("*", "")] == [], name
            assert signature.return_annotation in (None, "None") or "\nReturns:\n" in doc, name
            assert name in CANNOT_FAIL or "\nRaises:\n" in doc, name


def check_class(results):
    """A field has its line, and a method names its parameters."""
    if dataclasses.is_dataclass(results):
        attributes = (inspect.getdoc(results) or "").partition("\nAttributes:\n")[2]
        assert [f.name for f in dataclasses.fields(results) if f"    {f.name}: " not in attributes] == [], results
    for name in (name for name in vars(results) if not name.startswith("_")):
        method = getattr(results, name)
        if inspect.isroutine(method):
            given, doc = inspect.signature(method).parameters, inspect.getdoc(method) or ""
            assert [one for one in given if one != "self" and not re.search(rf"\b{one}\b", doc)] == [], method


@pytest.mark.parametrize(
    ("function", "kinds"),
    [(sarqc.quantize, QUANTIZE), (sarqc.estimate, QUANTIZE), (sarqc.compare, COMPARE), (sarqc.evaluate, EVALUATE)],
)
def test_signature_and_docstring_hold_every_option(function, kinds):
    shown, doc = inspect.signature(function), function.__doc__ or ""
    for kind in kinds:
        for name, one in options(kind).items():
            assert name in shown.parameters and f"    {name}: " in doc and one.help.split(". ")[0][:40] in doc
    assert "{options}" not in doc and all(heading in doc for heading in ("Args:", "Returns:", "Raises:"))


def test_a_type_checker_knows_every_keyword(tmp_path):
    """mypy takes the right keywords and refuses wrong ones: what an editor completes is what is accepted."""
    good = tmp_path / "good.py"
    good.write_text(
        textwrap.dedent(
            """
            import sarqc
            result = sarqc.quantize("m", "o", bits=3, sym=False, method="gptq", reg_lambda=0.1, act_order="none",
                                    dataset=["a text"], gram_budget=10**9, resume=False)
            result = sarqc.quantize("m", "o", quant=sarqc.QuantConfig(bits=3), method=sarqc.MethodConfig("awq"))
            size: int = result.size
            name: str = result.layers[0].name
            sarqc.compare("m", "o", methods=("rtn",), bits=(3, 4))
            sarqc.estimate("m", avg_bits=3.5)
            sarqc.evaluate("m", text="x", packed=False)
            """
        )
    )
    bad = tmp_path / "bad.py"
    wrong = ("bitz=3", 'bits="3"', 'act_order="desc"', "sym=1", "method=3", "num_samples=(1, 2)")
    bad.write_text("import sarqc\n" + "".join(f'sarqc.quantize("m", "o", {text})\n' for text in wrong))
    root = Path(sarqc.__file__).parents[1]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", root / "pyproject.toml", good, bad],
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    errors = [line for line in checked.stdout.splitlines() if "error:" in line]
    assert not [line for line in errors if "good.py" in line], checked.stdout
    assert {line.split(":")[1] for line in errors if "bad.py" in line} == {str(n + 2) for n in range(len(wrong))}, (
        errors
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def result(source, tmp_path_factory):
    return sarqc.quantize(source, tmp_path_factory.mktemp("out") / "w4", **SMALL)


def test_configurations_and_keywords_say_the_same(source, result, tmp_path):
    again = sarqc.quantize(
        source,
        tmp_path / "again",
        quant=sarqc.QuantConfig(group_size=32),
        method=sarqc.MethodConfig(),
        calibration=sarqc.CalibrationConfig(num_samples=8, seqlen=32),
        num_samples=4,  # a keyword changes a field
    )
    assert (again.out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    for wrong in ({"quant": 3}, {"method": 3}, {"calibration": "builtin"}, {"run": {}}, {"bitz": 3}):
        with pytest.raises(ArgumentError):
            sarqc.quantize(source, tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_a_result_has_the_numbers_of_its_report(result):
    report = result.report
    assert (result.method, result.size) == ("sarqc-gptq", report["size"]["bytes"])
    assert result.bits_per_weight == report["size"]["bits_per_weight"] and result.seconds > 0
    assert len(result.layers) == len(report["sites"]) and 0 < result.error < result.rtn_error
    first = result.layers[0]
    assert first.bits == 4 and first.rows == (4 * 32,) and first.name == report["sites"][0]["site"]
    assert "report" not in repr(result) and pickle.loads(pickle.dumps(result)) == result


# -- a model in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_model_in_memory_gives_what_its_folder_gives(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny.save(kind, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)  # fine-tuned
    model.save_pretrained(tmp_path / "tuned")
    tiny.tokenizer().save_pretrained(tmp_path / "tuned")
    straight = sarqc.quantize(tmp_path / "tuned", tmp_path / "straight", **SMALL)
    own = tmp_path / "own"
    quantized = sarqc.quantize(model, own / "out", tokenizer=tiny.tokenizer(), **SMALL)
    assert (quantized.out / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
    assert [path.name for path in own.iterdir()] == ["out"] and (quantized.out / "tokenizer.json").is_file()
    assert quantized.report["model"] == str(folder)
    assert sarqc.load(quantized.out)[0].config.model_type == model.config.model_type


def test_a_model_in_memory_does_not_resume(source, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(Interrupted, match="does not resume"):
        sarqc.quantize(model, tmp_path / "out", tokenizer=tiny.tokenizer(), progress=Stopping(1), **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_one_line(source, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    for given, family, results in (
        ((torch.nn.Linear(2, 2), {}), ArgumentError, "model is a Linear"),
        ((3, {}), ArgumentError, "model is a int"),
        ((source, {"tokenizer": tiny.tokenizer()}), ArgumentError, "tokenizer is for a model in memory"),
        ((model, SMALL), ModelError, "give tokenizer="),
    ):
        with pytest.raises(family, match=results):
            sarqc.quantize(given[0], tmp_path / "out", **given[1])
    assert list(tmp_path.iterdir()) == []


# -- solvers ----------------------------------------------------------------------------------------------------------


def test_a_registered_solver_is_a_method(own_methods, source, result, tmp_path):
    calls = []

    def solver(site, weight, *rest):
        calls.append(site)
        return SOLVERS["gptq"](site, weight, *rest)

    sarqc.register_solver("mine", solver, cd_passes=2, error_correction=True)
    assert sarqc.MethodConfig("mine").cd_passes == 2
    quantized = sarqc.quantize(source, tmp_path / "out", method="mine", **SMALL)
    assert calls and quantized.method == "mine"
    assert (quantized.out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    sarqc.register_solver("mine", solver)  # again, as in a notebook
    assert sarqc.MethodConfig("mine").cd_passes == 0


@pytest.mark.parametrize(
    ("name", "solver", "own", "message"),
    [
        ("gptq", print, {}, "'gptq' is taken"),
        ("rtn", print, {}, "'rtn' is taken"),
        ("", print, {}, "name = ''"),
        ("mine", 3, {}, "solver = 3"),
        ("mine", print, {"damp": 2}, "damp = 2"),
        ("mine", print, {"bits": 3}, "bits"),
    ],
)
def test_what_is_no_solver_is_refused(own_methods, name, solver, own, message):
    before = dict(METHODS)
    with pytest.raises(ArgumentError, match=message):
        sarqc.register_solver(name, solver, **own)
    assert before == METHODS


def test_an_earlier_name_still_works():
    with pytest.warns(RenamedWarning, match=r"sarqc.preflight is now sarqc.estimate"):
        assert sarqc.preflight is sarqc.estimate
    with pytest.warns(RenamedWarning, match=r"sarqc.QuantSpec is now sarqc.QuantConfig"):
        assert sarqc.QuantSpec is sarqc.QuantConfig
    with pytest.warns(RenamedWarning, match="watcher is now progress"), pytest.raises(ArgumentError, match="bits = 9"):
        sarqc.quantize("m", "o", watcher=None, bits=9)
    with pytest.warns(RenamedWarning, match="calib is now dataset"), pytest.raises(ArgumentError, match="bits = 9"):
        sarqc.quantize("m", "o", calib="x", bits=9)
