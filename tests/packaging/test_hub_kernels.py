"""The repository for Hugging Face's `kernels`: loaded from a folder, beside the package, it computes the same."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import sarqc_kernels
from benchmarks.serve.hub_kernels import BACKENDS, build, relative


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    return out, build(out)


def multiply(package) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (1, 64, 128), generator=rng, dtype=torch.uint8)
    weight = package.repack(codes, torch.rand(1, 64, 4, generator=rng), None, bits=3)
    return package.w4a16_matmul(torch.randn(5, 128, generator=rng), weight)


def test_it_is_whole_and_computes_the_same_beside_the_installed_one(built):
    """As `kernels` imports it: one module under a name of its own, no path to it."""
    out, space = built
    wanted = multiply(sarqc_kernels)
    for backend in BACKENDS:
        file = out / "build" / f"torch-{backend}" / "__init__.py"
        spec = importlib.util.spec_from_file_location(f"_loaded_{backend}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
            if backend == "cpu":  # both have one namespace of operations: a process loads the variant of its machine
                assert torch.equal(multiply(module), wanted)
                assert hasattr(getattr(torch.ops, space), "w4a16_matmul")
                assert all(hasattr(module, name) for name in sarqc_kernels.__all__)
        finally:
            for name in [name for name in sys.modules if name.startswith(spec.name)]:
                del sys.modules[name]


def test_a_name_that_cannot_be_made_relative_is_refused():
    assert relative("w4a16/cpu.py", "from sarqc_kernels.checks import x\n") == "from ..checks import x\n"
    assert relative("packing.py", "    from sarqc_kernels import y\n") == "    from . import y\n"
    with pytest.raises(ValueError, match="import sarqc_kernels"):
        relative("a.py", "import sarqc_kernels.packing\n")


def test_the_kernels_library_loads_it(built):
    kernels = pytest.importorskip("kernels")
    out, _ = built
    module = kernels.get_local_kernel(out, backend="cpu")
    assert module is not sarqc_kernels and torch.equal(multiply(module), multiply(sarqc_kernels))
