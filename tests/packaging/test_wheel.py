"""The wheel and the sdist: pure Python, with the CUDA sources and the tuned tables, and no more than that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sarqc

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "tests", "benchmarks", "build", "dist", "site")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What a build reads, copied, so that it leaves nothing here; and a tuned table, committed or not."""
    folder = tmp_path_factory.mktemp("tree") / "sarqc"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=LEFT_OUT)
    table = folder / "sarqc_kernels" / "gram" / "tuned" / "sm_00.json"
    table.parent.mkdir(exist_ok=True)
    table.write_text('{"choices": {}}', encoding="utf-8")
    return folder


def build(kind: str, tree: Path, to: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(to)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Package would be ignored" not in done.stdout + done.stderr
    return next(to.iterdir())


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built of the unpacked sdist, as `python -m build` and pip do."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return build("build_wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


def test_it_is_pure_and_holds_what_it_needs(wheel):
    assert wheel.name == f"sarqc-{sarqc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"sarqc-{sarqc.__version__}.dist-info/METADATA").decode())
    sources = {f"sarqc_kernels/csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cu*")}
    assert sources and sources <= names
    assert {"sarqc/py.typed", "sarqc_kernels/py.typed", "sarqc_kernels/gram/tuned/sm_00.json"} <= names
    modules = {str(path.relative_to(ROOT)) for package in (ROOT / "sarqc", ROOT / "sarqc_kernels")
               for path in package.rglob("*.py")}  # fmt: skip
    assert modules == {name for name in names if name.endswith(".py")}
    assert {name.split("/")[0] for name in names} == {"sarqc", "sarqc_kernels", f"sarqc-{sarqc.__version__}.dist-info"}
    assert set(metadata.get_all("Provides-Extra", [])) == {"demo", "data", "eval", "serve", "vllm", "docs", "dev"}


def test_what_it_installs_finds_its_sources_and_answers(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    own = {**os.environ, "PYTHONPATH": str(tmp_path)}
    asked = "from sarqc_kernels.build import sources; print(sources())"
    where = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert Path(where.stdout.strip()) == tmp_path / "sarqc_kernels" / "csrc", where.stderr
    helped = subprocess.run([sys.executable, "-m", "sarqc", "--help"], cwd=tmp_path, env=own, capture_output=True)
    assert helped.returncode == 0 and b"quantize" in helped.stdout
