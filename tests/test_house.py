"""The house keeps its own rules: who may import whom, and how long a file or a function may be. Read from the AST."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sarqc_kernels", "sarqc")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SARQC_FILES = [path for path in FILES if path.is_relative_to(ROOT / "sarqc")]
MAX_FILE, MAX_FUNCTION = 400, 80
MAX_PARAMETERS, MAX_FIELDS = 8, 12  # in sarqc/; a kernel has as many as it needs

CONFIG = tuple(
    f"sarqc.{name}"
    for name in ("config", "config_compare", "keywords", "kinds", "legacy", "methods", "options", "quant_config")
)
GROUND = (
    *CONFIG,
    "sarqc._version",
    "sarqc.contexts",
    "sarqc.conventions",
    "sarqc.errors",
    "sarqc.system",
    "sarqc_kernels",
)
"""What every room of `sarqc` may import; each of the files themselves only what `ROOMS` gives it."""
INSIDE = (*GROUND, "sarqc.method", "sarqc.model", "sarqc.checkpoint")

ROOMS = {
    # room -> (what of ours it may import, which of the guarded packages); later rooms never import upwards
    "sarqc_kernels.gram": (("sarqc_kernels.gram", "L0"), ()),
    "sarqc_kernels.columns": (("sarqc_kernels.columns", "L0"), ()),
    "sarqc_kernels.w4a16": (("sarqc_kernels.w4a16", "L0"), ()),
    "sarqc_kernels.dequant": (("sarqc_kernels.dequant", "L0"), ()),
    "sarqc_kernels.vllm_plugin": (("sarqc_kernels.vllm_plugin", "sarqc_kernels.w4a16", "L0"), ("vllm",)),
    # tries every operation, and nothing imports it but `sarqc doctor`
    "sarqc_kernels.selftest": (("sarqc_kernels",), ()),
    "sarqc_kernels": (("L0",), ()),
    "sarqc._version": ((), ()),
    "sarqc.contexts": ((), ()),
    "sarqc.conventions": ((), ()),
    "sarqc.errors": (("sarqc_kernels.errors",), ()),
    **dict.fromkeys(CONFIG, (("sarqc.errors", *CONFIG), ())),
    "sarqc.system": (("sarqc.errors", "sarqc._version"), ()),
    "sarqc.method": ((*GROUND, "sarqc.method"), ()),
    "sarqc.model": (
        (*GROUND, "sarqc.method", "sarqc.model"),
        ("transformers", "accelerate", "datasets", "huggingface_hub"),
    ),
    "sarqc.checkpoint": ((*GROUND, "sarqc.method", "sarqc.checkpoint"), ("safetensors",)),
    "sarqc.serving": ((*INSIDE, "sarqc.serving"), ()),
    "sarqc.report": ((*INSIDE, "sarqc.report"), ("huggingface_hub",)),
    # it puts a quantizer into transformers' own tables
    "sarqc.integrations": ((*INSIDE, "sarqc.integrations"), ("transformers",)),
    "sarqc.pipeline": ((*INSIDE, "sarqc.serving", "sarqc.report", "sarqc.pipeline"), ("greenlet",)),
    "sarqc.estimation": ((*INSIDE, "sarqc.serving", "sarqc.report", "sarqc.pipeline", "sarqc.estimation"), ()),
    "sarqc.comparison": ((*INSIDE, "sarqc.report", "sarqc.pipeline", "sarqc.comparison"), ()),
    "sarqc.entrypoints": (
        (
            *INSIDE,
            "sarqc.serving",
            "sarqc.report",
            "sarqc.pipeline",
            "sarqc.estimation",
            "sarqc.comparison",
            "sarqc.entrypoints",
        ),
        (),
    ),
    "sarqc.cli": (("sarqc", "sarqc_kernels"), ("rich", "typer", "yaml")),
    "sarqc": (("sarqc", "sarqc_kernels"), ()),
}
LOWEST = tuple(
    f"sarqc_kernels.{path.stem}"
    for path in (ROOT / "sarqc_kernels").glob("*.py")
    if path.stem not in ("__init__", "selftest")
)
GUARDED = (
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "greenlet",
    "rich",
    "typer",
    "yaml",
    "triton",
    "vllm",
)
PURE_ROOMS = ("sarqc.method", *CONFIG)
IMPURE = ("pathlib", "logging", "tqdm")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return max((room for room in ROOMS if module == room or module.startswith(room + ".")), key=len)


def imports_of(path: Path, *, typing: bool = False) -> list[tuple[str, int]]:
    """Modules a file imports, wherever in it; those that only a type checker reads with `typing` alone."""
    tree = ast.parse(path.read_text())
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing
        for inner in ast.walk(node)
    }
    items = []
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            items += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            items += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return items


def within(module: str, allowed: str) -> bool:
    return any(module == root or module.startswith(root + ".") for root in (LOWEST if allowed == "L0" else (allowed,)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_in_their_room(path):
    module = module_of(path)
    ours, others = ROOMS[room_of(module)]
    for imported, line in imports_of(path):
        root = imported.split(".")[0]
        if root in PACKAGES and module not in PACKAGES:  # the packages' own front pages show what lies inside
            assert any(within(imported, allowed) for allowed in ours), f"{path}:{line}: {module} imports {imported}"
        if root == "triton":
            allowed = path.stem.endswith("_impl") or module.startswith("sarqc_kernels.w4a16.triton.")
            assert allowed, f"{path}:{line}: triton is imported in *_impl.py and w4a16/triton/ alone"
        elif root in GUARDED:
            assert root in others, f"{path}:{line}: {module} imports {imported}"
        if room_of(module) in PURE_ROOMS:
            assert root not in IMPURE, f"{path}:{line}: {module} imports {imported}"


def test_no_two_files_lean_on_each_other():
    """Also where only a type checker reads the import. The packages' own front pages may show what lies inside."""
    files = {module_of(path): path for path in FILES if module_of(path) not in PACKAGES}
    needed = {}
    for module, path in files.items():
        names = [name for name, _ in imports_of(path, typing=True)]
        needed[module] = {next((n for n in (name, name.rpartition(".")[0]) if n in files), module) for name in names}
        needed[module].discard(module)
    TopologicalSorter(needed).prepare()  # CycleError names the files


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE, f"{path} has more than {MAX_FILE} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_files_of_tests_and_benchmarks_stay_small():
    for path in (path for room in ("tests", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py")):
        assert len(path.read_text().splitlines()) <= MAX_FILE, f"{path} has more than {MAX_FILE} lines"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if module_of(path).startswith("sarqc.")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_functions_and_records_stay_narrow(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len(arguments) - (arguments[:1] != [] and arguments[0].arg in ("self", "cls"))
            assert count <= MAX_PARAMETERS, f"{path}:{node.lineno}: {node.name} has {count} parameters"
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
            fields = [
                each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)
            ]
            assert len(fields) <= MAX_FIELDS, f"{path}:{node.lineno}: {node.name} has {len(fields)} fields"


def test_a_broad_except_says_why():
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            broad = re.match(r"\s*except (Base)?Exception\b|\s*except:", line)
            assert not broad or re.search(r": +# (?!noqa: \w+$)", line), f"{path}:{number}: say why"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sarqc_kernels", ("torch", "triton", "transformers")),
        ("import sarqc_kernels.columns", ("triton", "transformers")),
        ("import sarqc", ("transformers", "torch")),
        ("import sarqc.cli", ("transformers", "torch", "safetensors")),
        ("import sarqc.method.layer", ("transformers", "safetensors", "triton")),
    ],
)
def test_imports_are_light(statement, absent):
    check = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_launch_says_whether_products_and_sums_are_fused():
    """Triton 3.10 changes the default, and with it numbers and counted instructions."""
    launches, silent = 0, []
    for path in sorted((ROOT / "sarqc_kernels").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "import triton" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            launches += 1
            unpacked = {kw.value.id for kw in node.keywords if kw.arg is None and isinstance(kw.value, ast.Name)}
            if not unpacked & {"FUSED", "OPTIONS"}:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert launches > 10 and not silent, silent
