"""Whole runs whose output keeps every bit while code moves: a hash of all tensors that a checkpoint holds.

The hashes belong to a processor and a build of torch, because both choose the order of some sums. Elsewhere these tests
skip, and say so. `python -m tests.e2e.test_golden` prints them for this machine; a commit that changes them says why.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import sarqc
from tests.support import tiny
from tests.support.ranks import in_ranks
from tests.support.stopping import Stopping

HASHES = Path(__file__).with_name("golden.json")
SMALL = {"num_samples": 8, "seqlen": 32, "group_size": 32, "micro_batch": 2, "dtype": "float32"}
RUNS = {
    "dense": ("llama", {"bits": 4}),
    "dense, 3 bits": ("llama", {"bits": 3}),
    "dense, asymmetric gptq": ("llama", {"bits": 4, "sym": False, "method": "gptq"}),
    "dense, channel scales": ("llama", {"bits": 3, "method": "sarqc-awq-gptq"}),
    "moe": ("qwen3_moe", {"bits": 3}),
    "mixed bits": ("qwen3_moe", {"avg_bits": 4.0}),
}


def machine() -> str:
    """What the order of sums hangs on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def digest(out: Path) -> str:
    """A hash of the names and bytes of all tensors in a folder, however they are spread over its files."""
    entries = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                entries[name] = file.get_tensor(name)
    digest_sum = hashlib.sha256()
    for name in sorted(entries):
        digest_sum.update(f"{name} {entries[name].dtype} {list(entries[name].shape)}".encode())
        digest_sum.update(entries[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest_sum.hexdigest()[:32]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    hashes = json.loads(HASHES.read_text())
    if machine() not in hashes:
        pytest.skip(f"no hashes were recorded for {machine()}")
    return hashes[machine()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, folder / kind, num_hidden_layers=2) for kind in ("llama", "qwen3_moe")}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_every_bit(name, known, models, tmp_path):
    kind, options = RUNS[name]
    sarqc.quantize(models[kind], tmp_path / "out", **SMALL | options)
    assert digest(tmp_path / "out") == known[name]


def test_two_ranks_keep_every_bit(known, models, tmp_path):
    kind, options = RUNS["moe"]

    def run(rank: int) -> object:
        torch.set_num_threads(1)
        return sarqc.quantize(models[kind], tmp_path / "out", ordered=True, **SMALL | options)

    assert in_ranks(2, run, tmp_path / "log") == [(0, "")] * 2
    assert digest(tmp_path / "out") == known["moe"]


def test_a_resumed_run_keeps_every_bit(known, models, tmp_path):
    kind, options = RUNS["moe"]
    with pytest.raises(sarqc.SarqcError):
        sarqc.quantize(models[kind], tmp_path / "out", progress=Stopping(1), **SMALL | options)
    sarqc.quantize(models[kind], tmp_path / "out", **SMALL | options)
    assert digest(tmp_path / "out") == known["moe"]


def _record() -> None:
    """Print the hashes of this machine."""
    import tempfile

    torch.set_num_threads(1)
    hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, options) in RUNS.items():
            source = tiny.save(kind, Path(folder) / name / kind, num_hidden_layers=2)
            sarqc.quantize(source, Path(folder) / name / "out", **SMALL | options)
            hashes[name] = digest(Path(folder) / name / "out")
    print(json.dumps({machine(): hashes}, indent=2))


if __name__ == "__main__":
    _record()
