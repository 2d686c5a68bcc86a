"""Tests with the oldest and the newest versions that pyproject.toml allows: python -m benchmarks.versions [NAME ...].

`oldest` installs every dependency at its lower bound, `newest` the last release of each, in environments of their own
under build/versions; 5 to 10 GB of CUDA packages come with a torch that is no CPU build. --with PACKAGE==VERSION takes
another version of one. benchmarks/results/versions.json gets what was installed and what passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
TESTS = (
    "tests/method", "tests/integrations", "tests/model/test_build.py", "tests/model/test_lazy_model.py",
    "tests/model/test_sites.py", "tests/model/test_moe.py", "tests/model/test_usage.py",
    "tests/checkpoint/test_pack_quantized.py", "tests/checkpoint/test_reading.py", "tests/entrypoints/test_quantize.py",
    "tests/kernels/test_gram_triton.py",
)  # fmt: skip
"""What depends on the versions: files, transformers' models and loading, Triton's interpreter, whole runs."""
_TOOLS = ("pytest", "hypothesis", "matplotlib", "setuptools")


def requirements() -> dict[str, str]:
    """Lower bounds of the package's dependencies and of compressed-tensors, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    actual = (re.match(r"([\w-]+)>=([\w.]+)", one) for one in wanted)
    return {match[1]: match[2] for match in actual if match}


def installed() -> dict[str, str]:
    """Versions in the environment of this process."""
    installed_versions = {}
    for name in requirements():
        try:
            installed_versions[name] = version(name)
        except PackageNotFoundError:
            installed_versions[name] = "none"
    return installed_versions


def environment(name: str, others: dict[str, str]) -> Path:
    """Make the environment `oldest` or `newest`; its interpreter."""
    place = ROOT / "build" / "versions" / name
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    bounds = {package: f"=={bound}" if name == "oldest" else f">={bound}" for package, bound in requirements().items()}
    bounds |= {package: f"=={chosen}" for package, chosen in others.items()}
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*install, f"torch{bounds['torch']}"], check=True)
    subprocess.run([*install, *(package + bound for package, bound in bounds.items()), *_TOOLS], check=True)
    return python


def tested(python: Path) -> dict[str, Any]:
    """Run the tests there; what was installed, and what came of them."""
    report = ROOT / "build" / "versions" / f"{os.getpid()}.xml"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = ["-m", "pytest", "-m", "not slow", f"--junitxml={report}", "-p", "no:cacheprovider", *TESTS]
    subprocess.run([python, *arguments], cwd=ROOT, env=environment, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases for kind in case if kind.tag in _BAD]
    skipped = sum(kind.tag == "skipped" for case in cases for kind in case)
    code = "import json; from benchmarks.versions import installed; print(json.dumps(installed()))"
    done = subprocess.run([python, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    report.unlink()
    return {
        "versions": {"python": sys.version.split()[0], **json.loads(done.stdout)},
        "passed": len(cases) - len(failed) - skipped,
        "failed": failed,
        "skipped": skipped,
    }


_BAD = ("failure", "error")


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], "oldest", "newest"])
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="PACKAGE==VERSION")
    args = parser.parse_args()
    others = dict(one.split("==", 1) for one in args.others)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.names or ("oldest", "newest"):
        results[name] = tested(environment(name, others))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if any(result["failed"] for result in results.values()):
        sys.exit("\n".join(line for result in results.values() for line in result["failed"]))


if __name__ == "__main__":
    main()
