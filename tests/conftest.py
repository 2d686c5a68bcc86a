"""What all tests share: one thread each, random numbers by the test's own name, no network."""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator, Iterator
from typing import Any

# Before torch is imported. Tests run side by side; small operations on more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

import sarqc
from sarqc import system
from sarqc.model import dataset
from sarqc.model import tokenizer as tokenizer_of_runs
from tests.support.faults import Outcomes

# Drawn examples are the same on every run, and a busy machine fails no test.
hypothesis.settings.register_profile("sarqc", derandomize=True, deadline=None)
hypothesis.settings.load_profile("sarqc")

# transformers is an oracle here: it loads what we write in its own way, but for tests that ask for ours.
sarqc.unregister()

if not torch.cuda.is_available():
    # Without a GPU, Triton kernels are held by its interpreter, which has to be asked for before anything imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): tries a fault, and tells the fixture `outcomes` what it ended in")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test that tries a fault has to look how it ends."""
    result = yield
    if pyfuncitem.get_closest_marker("fault") and not any(dict(pyfuncitem.user_properties).get("outcomes", {})):
        pytest.fail("marked as a fault, and saw it end in nothing: tell the fixture `outcomes`")
    return result


@pytest.fixture(scope="session", autouse=True)
def _fp32() -> Iterator[None]:
    """No result hangs on how fast this CPU multiplies bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "multiplies_bf16", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _tokenized_once() -> Iterator[None]:
    """A third of a small run is the time in which its tokenizer goes through the packaged text: once will do."""
    tokens: dict[tuple[object, ...], list[int]] = {}

    def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return tokenizer_of_runs.encode(tokenizer, text, special=special)
        key = backend.to_str(), tokenizer.model_max_length, text, special
        if key not in tokens:
            tokens[key] = tokenizer_of_runs.encode(tokenizer, text, special=special)
        return tokens[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "encode", encode)
        yield


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """What this test's faults end in; the report of the test carries it along."""
    result = Outcomes()
    request.node.user_properties.append(("outcomes", result.counts))
    return result


@pytest.fixture
def registered() -> Iterator[None]:
    """transformers loads as it does for a user who imported sarqc."""
    sarqc.register()
    yield
    sarqc.unregister()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A random generator seeded by the test's id: the same numbers on every run, others in every test."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def own_methods() -> Iterator[None]:
    """Methods that the test registers are gone after it."""
    from sarqc.method.layer import SOLVERS
    from sarqc.methods import METHODS

    methods, solvers = dict(METHODS), dict(SOLVERS)
    yield
    for name in METHODS.keys() - methods.keys():
        del METHODS[name]
    for name in SOLVERS.keys() - solvers.keys():
        del SOLVERS[name]
