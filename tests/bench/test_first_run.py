"""The first run on a GPU, tried on a CPU: parts that pass, fail, crash and hang; what stays on disk; the last lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.budget import Budget
from benchmarks.first_run import cache, command, portable
from benchmarks.first_run.command import Outcome, Part
from benchmarks.ops import OPS


def module(folder: Path, name: str, text: str) -> tuple[str, ...]:
    """A module that `portable` can run, by its name."""
    (folder / f"{name}.py").write_text(text)
    return (name,)


def test_no_part_takes_anything_from_the_others(tmp_path: Path) -> None:
    """One that fails, one that dies of a signal, one that hangs with a child, and one after them all."""
    hangs = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
    todo = [
        Part("tests fail", module(tmp_path, "one", "print('why it failed')\nraise SystemExit(3)"), 1),
        Part("tests crash", module(tmp_path, "two", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"), 1),
        Part("hang", module(tmp_path, "three", hangs + "time.sleep(99)"), 1),
        Part("fine", (*module(tmp_path, "four", "import sys\nprint('minutes', sys.argv[1])"), "{}"), 1),
    ]
    began = time.monotonic()
    environment = {"PYTHONPATH": f"{tmp_path}:{command.ROOT}", "PATH": "/usr/bin:/bin"}
    result = command.Run(Budget(0.8), tmp_path / "out", environment, tmp_path).all(todo)
    assert time.monotonic() - began < 48
    by_name = {each.name: each for each in result}
    statuses = {name: each.status for name, each in by_name.items()}
    assert statuses == {"tests fail": "failed", "tests crash": "failed", "hang": "timed out", "fine": "passed"}
    assert "why it failed" in by_name["tests fail"].tail and "minutes" in by_name["fine"].tail
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {each["name"] for each in summary["outcomes"]} == set(by_name) and summary["to come"] == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "log.txt"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "## tests fail: failed" in log and "why it failed" in log and "## fine: passed" in log
    lines = command.last_lines(result, tmp_path / "out")
    assert lines[0].startswith("1 of 4 parts passed, 0 numbers") and "hang: timed out" in lines[3]


def test_tests_run_side_by_side_and_what_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "cpu_count", lambda: 2)
    text = """
        import pathlib, time
        me, folder = pathlib.Path(__file__), pathlib.Path(__file__).parent
        me.with_suffix(".begun").touch()
        until = time.monotonic() + {seconds}
        while time.monotonic() < until and len(list(folder.glob("*.begun"))) < {wanted}:
            time.sleep(0.05)
        raise SystemExit(len(list(folder.glob("*.begun"))) != {wanted})
    """
    written = [
        module(tmp_path, name, textwrap.dedent(text.format(seconds=seconds, wanted=wanted)))
        for name, seconds, wanted in (("one", 15, 2), ("two", 15, 2), ("three", 2, 3), ("four", 0, 4))
    ]
    names = ("tests one", "tests two", "three", "four")
    todo = [Part(name, arguments, 1) for name, arguments in zip(names, written)]
    environment = {"PYTHONPATH": f"{tmp_path}:{command.ROOT}", "PATH": "/usr/bin:/bin"}
    result = command.Run(Budget(2.0), tmp_path / "out", environment, tmp_path).all(todo)
    assert {each.name: each.status for each in result} == dict.fromkeys(names, "passed")


def test_where_time_is_short_the_first_parts_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty parts of a minute: the share of each would be less than a part needs at least."""
    monkeypatch.setattr(command, "_outcome", lambda part, *given: Outcome(part.name, "passed", given[0], ""))
    monkeypatch.setattr(command.os, "cpu_count", lambda: 1)
    clock = iter(range(0, 10_000, 3))
    budget = Budget(1.0, clock=lambda: float(next(clock)))
    result = command.Run(budget, tmp_path, {}, tmp_path).all([Part(f"tests {i}", ("this",), 1) for i in range(20)])
    statuses = [each.status for each in result]
    assert statuses[0] == "passed" and statuses[-1] == "left out" and statuses == sorted(statuses, reverse=True)


def test_what_has_no_time_is_said(tmp_path: Path) -> None:
    (result,) = command.Run(Budget(0.0), tmp_path, {}, tmp_path).all([Part("fine", ("this",), 1)])
    assert result.status == "left out"


def record(op: str, point: str, seconds: float, contender: str = "sarqc triton", **own) -> dict:
    return {"status": "timed", "op": op, "point": point, "contender": contender, "ours": True, "part": "whole",
            "seconds": {"p50": seconds}, "roof_seconds": 5e-6, "goal_share": None, "goal_seconds": None,
            **own}  # fmt: skip


def test_goals_that_are_missed_are_the_last_lines() -> None:
    """The best of ours counts; the farthest from its goal comes first; parts and rivals do not count."""
    result = [
        record("w4a16", "a", 30e-6, goal_share=0.5),
        record("w4a16", "a", 12e-6, "sarqc cuda", goal_share=0.5),
        record("w4a16", "b", 9e-6, goal_share=0.5),
        record("columns", "c", 9e-3, goal_seconds=6e-3),
        record("columns", "c", 1e-3, goal_seconds=6e-3, part="factor"),
        record("gram", "d", 9e-3),
        record("gram", "e", 9e-3, goal_share=0.5, ours=False),
    ]
    lines = command.missing(result)
    assert [line.split(":")[0] for line in lines] == ["columns c", "w4a16 a"]
    assert "12.0 us by sarqc cuda, 1.20 of the goal of 10.0 us" in lines[1]


def test_parts_are_tests_first_and_cover_every_operation(tmp_path: Path) -> None:
    result = command.parts(tmp_path, quick=True, device="cpu")
    names = [each.name for each in result]
    assert set(command.ORDER) == set(OPS) and all((command.ROOT / each.arguments[-1]).exists()
                                                  for each in result if each.name.startswith("tests "))  # fmt: skip
    first = next(at for at, name in enumerate(names) if not name.startswith("tests "))
    assert names[first:] == [*command.ORDER, "whole", "quantize", "decode"]


def test_kernels_at_risk_are_tested_first_and_alone(tmp_path: Path) -> None:
    """Each file is a process, so what an access that is not allowed ends is that file."""
    names = [each.name for each in command.parts(tmp_path, quick=True, device="cpu")]
    assert names[:2] == ["tests cholesky", "tests descent"] and len(set(names)) == len(names)


@pytest.mark.parametrize(("status", "told"), [("failed", True), ("timed out", True), ("passed", False)])
def test_where_a_kernel_at_risk_fails_the_way_out_is_named(status: str, told: bool, tmp_path: Path) -> None:
    outcomes = [Outcome("tests cholesky", status, 1.0, "1 failed"), Outcome("tests gram", "failed", 1.0, "1 failed")]
    lines = [line for line in command.last_lines(outcomes, tmp_path) if "SARQC_BACKEND=reference" in line]
    assert [line.split(":")[0] for line in lines] == ["tests cholesky"] * told


def test_a_run_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One operation, from the command to its records."""
    every = command.parts
    monkeypatch.setattr(command, "parts", lambda *given: [each for each in every(*given) if each.name == "gram"])
    none = ["--cache", str(tmp_path / "none")]
    assert command.main(["--quick", "--device", "cpu", "--minutes", "4", "--out", str(tmp_path / "out"), *none]) == 0
    result = records.read(tmp_path / "out" / "records.jsonl")
    assert records.of_status(result, "timed") and {each["op"] for each in result} == {"gram"}
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("1 of 1 parts passed")
    assert "1 of 1 parts passed" in capsys.readouterr().out


def test_only_what_a_launch_reads_is_packed(tmp_path: Path) -> None:
    for name in ("triton/a/k.cubin", "triton/a/k.json", "triton/a/k.ttir", "sarqc/gemv.so"):
        path = tmp_path / "gpu-cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    size = cache.pack(tmp_path / "gpu-cache", tmp_path / "c.tar.gz")
    with tarfile.open(tmp_path / "c.tar.gz") as file:
        assert file.getnames() == ["gpu-cache/sarqc/gemv.so", "gpu-cache/triton/a/k.cubin", "gpu-cache/triton/a/k.json"]
    assert size == (tmp_path / "c.tar.gz").stat().st_size


def test_a_cache_that_was_carried_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own cache, which writes whole paths down."""
    cache_module = pytest.importorskip("triton.runtime.cache")
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "here"))
    manager = cache_module.FileCacheManager("key")
    manager.put_group("k.json", {"k.cubin": manager.put(b"code", "k.cubin"), "k.json": manager.put("{}", "k.json")})
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "there"))
    assert cache_module.FileCacheManager("key").get_group("k.json") == {}
    assert portable.relocate(tmp_path / "there") == 1
    assert set(cache_module.FileCacheManager("key").get_group("k.json")) == {"k.cubin", "k.json"}


def test_an_archive_is_unpacked_and_says_what_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another version's kernels are of no use, and that is said before minutes are spent."""
    folder = tmp_path / "made" / "gpu-cache"
    (folder / "triton").mkdir(parents=True)
    (folder / portable.NOTE).write_text("0.0.1\n")
    cache.pack(folder, tmp_path / "gpu-cache.tar.gz")
    result = command.carried(tmp_path / "gpu-cache")
    assert result["TRITON_CACHE_DIR"] == str(tmp_path / "gpu-cache" / "triton")
    assert "0 kernels of triton 0.0.1" in (printed := capsys.readouterr().out) and "OF NO USE" in printed
    assert command.carried(tmp_path / "none") == {} and "compiled here" in capsys.readouterr().out


def test_packages_of_a_cache_are_taken_where_there_are_none(tmp_path: Path) -> None:
    """One of another Python must not hide the package that is installed."""
    (tmp_path / portable.SITE / "pytest").mkdir(parents=True)
    (tmp_path / portable.SITE / "pytest-9.dist-info").mkdir()
    assert "PYTHONPATH" not in portable.variables(tmp_path)
    (tmp_path / portable.SITE / "no_such_package").mkdir()
    assert portable.variables(tmp_path)["PYTHONPATH"].endswith(str(tmp_path / portable.SITE))


@pytest.mark.slow
def test_only_tests_that_a_gpu_can_fail() -> None:
    """Some of every file that is run, none of those that hold on any machine."""
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p",
         "benchmarks.first_run.on_device", *command.test_files()],
        cwd=command.ROOT, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    names = [line for line in collected if "::" in line]
    files = {line.split("::")[0] for line in names}
    assert files == set(command.test_files())
    assert any("[triton-" in line or "[triton]" in line for line in names)
    assert any("test_on_a_gpu" in line for line in names) and any("test_every_plan_gives" in line for line in names)
    assert not [line for line in names if any(word in line for word in ("[reference", "test_refuses", "is_chosen"))]


def test_what_a_cache_lacked_is_named(tmp_path: Path) -> None:
    """Of every part, in the summary and in the last lines; what was carried is not."""
    for name in ("triton/KEY/carried.cubin", "sarqc/columns.so"):
        (tmp_path / "cache" / name).parent.mkdir(parents=True)
        (tmp_path / "cache" / name).touch()
    text = "import pathlib\np = pathlib.Path({!r})\np.mkdir()\n(p / 'dot_kernel.cubin').touch()"
    folders = [str(tmp_path / "cache" / "triton" / key) for key in "AB"]
    todo = [Part(each[-1], module(tmp_path, f"compiles_{each[-1]}", text.format(each)), 1) for each in folders]
    todo.append(Part("neither", module(tmp_path, "neither", ""), 1))
    environment = {"PYTHONPATH": f"{tmp_path}:{command.ROOT}", "PATH": "/usr/bin:/bin"}
    result = command.Run(Budget(2.0), tmp_path / "out", environment, tmp_path / "cache").all(todo)
    assert [each.compiled for each in result] == [("dot_kernel",), ("dot_kernel",), ()]
    assert "2 kernels were compiled here: 2 dot_kernel" in command.last_lines(result, tmp_path / "out")


def test_stubs_that_triton_builds_by_gcc_are_counted_apart(tmp_path: Path) -> None:
    """They are no kernels of ours, and are compiled on every machine anew."""
    folder = tmp_path / "cache" / "triton" / "KEY"
    suffix = "cpython-312-x86_64-linux-gnu.so"
    names = [f"__triton_launcher.{suffix}", f"cuda_utils.{suffix}", "dot_kernel.cubin", "dot_kernel.ttir"]
    text = f"import pathlib\np = pathlib.Path({str(folder)!r})\np.mkdir(parents=True)\n"
    todo = [Part("compiles", module(tmp_path, "compiles", text + f"[(p / n).touch() for n in {names}]"), 1)]
    environment = {"PYTHONPATH": f"{tmp_path}:{command.ROOT}", "PATH": "/usr/bin:/bin"}
    (result,) = command.Run(Budget(1.0), tmp_path / "out", environment, tmp_path / "cache").all(todo)
    assert result.compiled == ("__triton_launcher", "cuda_utils", "dot_kernel")
    lines = command.last_lines([result], tmp_path / "out")
    assert "1 kernels were compiled here: 1 dot_kernel" in lines
    assert any(line.startswith("2 stubs of launches were compiled here") for line in lines)
    cache.pack(tmp_path / "cache", tmp_path / "c.tar.gz")
    with tarfile.open(tmp_path / "c.tar.gz") as file:
        assert file.getnames() == ["cache/triton/KEY/dot_kernel.cubin"]


def rehearsed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module on an H200 that is not there, with a cache of its own."""
    environment = {**os.environ, **portable.variables(folder), portable.REHEARSE: "1", "PYTHONPATH": str(command.ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = [sys.executable, "-m", "benchmarks.first_run.portable", *arguments]
    return subprocess.run(run, cwd=command.ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_rehearsal_asks_for_what_a_gpu_would(tmp_path: Path) -> None:
    """Kernels for sm_90 by launches of whole sizes, which no CPU could compute, and never the same twice."""
    out = tmp_path / "r.jsonl"
    arguments = ("benchmarks.run", "gram", "--quick", "--skip-tests", "--out", str(out))
    done = rehearsed(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    timed = records.of_status(records.read(out), "timed")
    assert {each["gpu"] for each in timed} == {"H200 of a rehearsal"} and any(each["ours"] for each in timed)
    made = portable.kernels(tmp_path)
    assert any(name.endswith("_accumulate.cubin") for name in made)
    assert rehearsed(tmp_path, *arguments).returncode == 0 and portable.kernels(tmp_path) == made


@pytest.mark.slow
def test_a_rehearsed_test_sees_a_card(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import torch\n"
        "def test_it():\n"
        "    x = torch.randn(1 << 20, 1 << 20, device='cuda', generator=torch.Generator('cuda').manual_seed(0))\n"
        "    assert x.is_cuda and torch.cuda.get_device_capability() == (9, 0)\n"
        "    assert (x[:2, :2].cpu() == 1).all() and x.sum().item() == 1.0 and not x.isnan().nonzero().tolist()\n"
        "    assert x[1, 16:].data_ptr() % 64 == 0 and x[x > 0].shape == (1 << 40,)\n"
        "    assert torch.ones(3).sum().item() == 3\n"
    )
    done = rehearsed(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_whole_run_of_a_model_made_here(tmp_path: Path) -> None:
    """Dense and with experts, to the last block; what is quantized badly does not pass."""
    from benchmarks.first_run import whole

    out = tmp_path / "r.jsonl"
    assert whole.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    dense, experts = records.of_status(records.read(out), "run")
    for record in (dense, experts):
        assert record["blocks"] == 4 and {"load", "forward", "solve", "write"} <= record["seconds"].keys()
        assert record["error"] < record["rtn_error"] and record["logits_error"] < 0.05
