"""The lazy build: keys, races, reasons, and that nvcc takes our sources for every card without spilling."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sarqc_kernels import build
from sarqc_kernels.columns import cuda_impl
from sarqc_kernels.device import device_info
from sarqc_kernels.errors import BackendError

PRETENDED = """#!/bin/sh
if [ "$1" = --version ]; then echo "release {version}"; exit 0; fi
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of the test's own; what it made of a library is not what the tests after it find."""
    monkeypatch.setenv("SARQC_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    build.unsupported_reason.cache_clear()
    yield
    build.library.cache_clear()
    build.unsupported_reason.cache_clear()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that writes down how it is called; returns its script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nvcc"
    script.write_text(PRETENDED.format(version="1", log=tmp_path / "log"))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return script


def real_nvcc() -> str:
    try:
        return build.nvcc()
    except BackendError as error:
        pytest.skip(str(error))


def test_builds_once_for_each_source_card_and_compiler(
    pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "thing.cu").write_text("one")
    monkeypatch.setattr(build, "PLACES", (tmp_path / "nowhere", csrc))
    first = build.compile_library("thing", 90)
    assert first.parent == tmp_path / "cache" and first.read_text() == "made\n"
    assert build.compile_library("thing", 90) == first
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    made = {first, build.compile_library("thing", 80)}
    (csrc / "shared.cuh").write_text("a header counts too")
    made.add(build.compile_library("thing", 90))
    pretended.write_text(pretended.read_text().replace("release 1", "release 2"))
    made.add(build.compile_library("thing", 90))
    assert len(made) == 4 == len((tmp_path / "log").read_text().splitlines())
    assert set((tmp_path / "cache").iterdir()) == made  # nothing half made is left behind
    called = (tmp_path / "log").read_text()
    assert "code=sm_90a" in called and "code=sm_80" in called


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended: Path) -> None:
    assert "there is no" in str(build.unsupported_reason("nothing_of_that_name", 90))
    pretended.write_text("#!/bin/sh\necho bad luck >&2\nexit 1\n")
    assert "nvcc failed for columns-sm90a" in str(build.unsupported_reason("columns", 90))
    assert "bad luck" in str(build.unsupported_reason("columns", 90))
    pretended.write_text(PRETENDED.format(version="3", log=tmp_path / "log"))
    build.unsupported_reason.cache_clear()
    assert "does not load" in str(build.unsupported_reason("columns", 90))
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    build.unsupported_reason.cache_clear()
    assert "nvcc is neither on PATH" in str(build.unsupported_reason("columns", 90))
    monkeypatch.setattr(build, "PLACES", (tmp_path,))
    with pytest.raises(BackendError, match=r"no csrc/\*.cu"):
        build.sources()


def test_an_unwritable_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pretended: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SARQC_CACHE", str(tmp_path / "file"))
    assert "set SARQC_CACHE" in str(build.unsupported_reason("columns", 80))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SARQC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/sarqc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "sarqc"


def test_the_library_loads_and_agrees_on_its_struct() -> None:
    real_nvcc()
    library = cuda_impl.bind(build.library("columns", 90))
    assert library.sarqc_columns_size() == ctypes.sizeof(cuda_impl.Columns)


def test_a_library_that_loads_may_not_run_here() -> None:
    """Without a card no kernel does, and the reason holds both versions and a way out."""
    real_nvcc()
    if torch.cuda.is_available():
        arch = device_info(torch.device("cuda", 0)).arch
        assert [build.unsupported_reason(name, arch) for name in ("columns", "gemv")] == [None, None]
        return
    for name in ("columns", "gemv"):
        reason = build.unsupported_reason(name, 90)
        assert re.search(r"do not run: .* \(CUDA [\d.]+, the driver takes up to none\); update the driver", str(reason))


def test_without_a_home_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, pretended: Path) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SARQC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert re.search("no home folder.*set SARQC_CACHE", str(build.unsupported_reason("columns", 90)))


def test_a_compiler_that_cannot_be_asked_is_a_reason(monkeypatch: pytest.MonkeyPatch, pretended: Path) -> None:
    """What goes wrong before anything is built, and what is said in no known encoding."""
    pretended.write_bytes(b"#!/bin/sh\nprintf '\\377\\n'; printf '\\377 bad luck\\n' >&2; exit 1\n")
    assert "bad luck" in str(build.unsupported_reason("columns", 90))
    pretended.write_text("no interpreter line that exists")
    build.unsupported_reason.cache_clear()
    assert "cannot build columns.cu" in str(build.unsupported_reason("columns", 90))


def test_fields_are_those_of_the_source() -> None:
    """In name and order: a struct of the same size could still be shuffled."""
    text = (build.sources() / "columns.cu").read_text()
    body = re.sub(r"//.*", "", re.search(r"struct Columns \{(.*?)\};", text, re.S)[1])
    names = [re.search(r"(\w+)$", part.strip())[1] for part in re.split(r"[;,]", body) if part.strip()]
    assert names == [field[0] for field in cuda_impl.Columns._fields_]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nothing_spills(arch: int, tmp_path: Path) -> None:
    card = build.arch_name(arch)
    target = ["-cubin", "-Xptxas", "-v", f"-gencode=arch=compute_{card},code=sm_{card}", "-o", str(tmp_path / "cubin")]
    source = build.sources() / "columns.cu"
    done = subprocess.run([real_nvcc(), "-std=c++17", "-O3", *target, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 3 and all(number == "0" for kernel in spills for number in kernel)
    assert "warning" not in done.stderr


def test_only_the_device_of_the_call_gets_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on device 3 of 8 makes no context on device 0."""
    current: list[str] = []

    class Guard(contextlib.nullcontext):  # type: ignore[type-arg]
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            current.append(str(device))

    class Ready:
        def sarqc_ready(self, versions: object) -> int:
            return 0

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(build, "library", functools.cache(lambda name, arch, defines: Ready()))
    assert build.unsupported_reason("columns", 90, torch.device("cuda", 3)) is None
    assert current == ["cuda:3"]


def test_one_process_builds_while_the_others_wait(
    pretended: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretended.write_text(pretended.read_text().replace('echo made > "$2"', 'sleep 0.3; echo made > "$2"'))
    code = "from sarqc_kernels import build; print(build.compile_library('columns', 90))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert sum("nvcc builds columns.cu" in text for text in outputs) == 1
    assert not list((tmp_path / "cache").glob("*.lock"))
