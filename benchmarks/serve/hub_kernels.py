"""`sarqc_kernels` as a repository that Hugging Face's `kernels` loads: plain torch and Triton, nothing compiled.

    python -m benchmarks.serve.hub_kernels OUT

writes OUT/build/torch-cpu and OUT/build/torch-cuda, a copy of the package and a metadata.json in each, for

    kernels.get_local_kernel(OUT)                       # a folder
    kernels.get_kernel("OWNER/NAME", version=1)         # after `hf upload OWNER/NAME OUT --revision v1`

`kernels` loads a package under a name of its own, possibly beside an installed one. So imports become relative and the
operations get a namespace of the build's own: two libraries may not define one operation. CUDA C++ and C++, which
`sarqc_kernels` compiles on first use, stay out: what it needs is not there, the log says so, and Triton or torch runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2] / "sarqc_kernels"
NAME, VERSION = "sarqc-kernels", 1
BACKENDS = ("cpu", "cuda")
OUTSIDE = ("vllm_plugin", "csrc")
"""Parts that are of no use without an installation."""
_FROM = re.compile(r"^(\s*)from sarqc_kernels(?:\.([\w.]+))? import ", re.MULTILINE)
_OPS = re.compile(r'Library\("sarqc"|torch\.ops\.sarqc\b|"sarqc::')


def sources() -> dict[str, str]:
    """Files of the package by path, without `OUTSIDE`."""
    files = {}
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("tuned/*.json")]):
        name = path.relative_to(ROOT).as_posix()
        if name.partition("/")[0] not in OUTSIDE:
            files[name] = path.read_text(encoding="utf-8")
    return files


def relative(name: str, text: str) -> str:
    """A file's imports of the package, seen from where it lies."""
    dots = "." * (name.count("/") + 1)
    text = _FROM.sub(lambda match: f"{match[1]}from {dots}{match[2] or ''} import ", text)
    text = text.replace('f"sarqc_kernels.{', 'f"{__name__}.{')
    if left := re.search(r"^\s*import sarqc_kernels.*$|import_module\(.sarqc_kernels", text, re.MULTILINE):
        raise ValueError(f"{name} holds {left[0].strip()!r}, which names the package: import from it instead")
    return text


def build(out: Path) -> str:
    """Write both variants; the namespace of their operations, which their content decides."""
    files = {name: relative(name, text) if name.endswith(".py") else text for name, text in sources().items()}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    space = f"sarqc_{digest}"
    for backend in BACKENDS:
        place = out / "build" / f"torch-{backend}"
        shutil.rmtree(place, ignore_errors=True)
        for name, text in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_OPS.sub(lambda match: match[0].replace("sarqc", space), text), encoding="utf-8")
        about = {
            "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (place / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(ROOT.parent / "LICENSE", out / "LICENSE")
    (out / "README.md").write_text(_card(), encoding="utf-8")
    return space


def _card() -> str:
    return (
        "---\nlicense: apache-2.0\ntags: [kernels]\n---\n\n# sarqc-kernels\n\n"
        "Weight-only quantization, tensors in, tensors out: `gram_accumulate_`, `quantize_columns`, `w4a16_matmul`, "
        "`w4a16_experts` and others, in Triton and plain torch. Made from sarqc's sources.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    print(f"{out}: operations in torch.ops.{build(out)}")


if __name__ == "__main__":
    main()
