"""A whole process on an H200 that is not there: `python -m benchmarks.first_run --rehearse`.

Tensors on "cuda" have a shape and no numbers (torch's own fake tensors), so whole models fit and nothing is computed.
All else is as it would be there: the sizes, what is launched, what Triton is asked to compile. A number that is read
back from the card is a one. Launches take no time, so what is timed is the host; no result is right.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sarqc_kernels import cpu_build

__all__ = ["GPU", "begin"]

GPU = "H200 of a rehearsal"
MEMORY = 139 << 30
ADDRESS = 1 << 20  # of every tensor's memory: as well aligned as what a GPU allocates
aten = torch.ops.aten


class Numbers(TorchDispatchMode):
    """Tensors on "cuda" are fake, all others real. Our own operations run, so that their launch code does."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        places = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if not ("cuda" in places or any(isinstance(leaf, FakeTensor) for leaf in leaves)):
            return func(*args, **kwargs)
        if own := OPDEFS.get(func._schema.name):
            with self:
                return own._init_fn(*args, **kwargs)
        if func in READS:
            return READS[func](*args)
        if func.namespace == "aten":  # below autograd, what is made of other operations comes as it is
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0]  # to the host
        with self.fake:
            result = DYNAMIC[func](*args) if func in DYNAMIC else func(*args, **kwargs)
        return torch.ones(result.shape, dtype=result.dtype) if "cpu" in places else result


def _number(tensor: Tensor) -> bool | int | float:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


READS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda *_: True,
    aten.is_nonzero.default: lambda *_: True,
}
"""What waits for the card to hand over a number."""


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as indices of each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    result: Tensor = aten.index.Tensor(x, [place for index in indices for place in _places(index)])
    return result


DYNAMIC: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: lambda x: x.new_empty((0, x.dim()), dtype=torch.int64),  # what is looked for is not there
    aten.index.Tensor: _index,
    aten.masked_select.default: lambda x, mask: x.new_empty(x.numel()),
    aten.bincount.default: lambda x, weights=None, least=0: x.new_empty(max(1, least), dtype=torch.int64),
}
"""What has a shape that hangs on numbers: as if a mask were true all over."""


class Generator(torch.Generator):
    """One of the host that says which device it was asked for."""

    own: torch.device
    device: torch.device = cast(Any, property(attrgetter("own")))  # of torch's it is that of the host

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.own = torch.device(device)
        return made

    def __init__(self, *_: Any) -> None:
        pass


class Event:
    """A point of the host's time."""

    at = 0.0

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Now."""
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    wait = query = synchronize

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds; never none at all."""
        return max(1e-3, 1e3 * (end.at - self.at))


class Graph:
    """Replays nothing."""

    def replay(self) -> None:
        """Nothing."""


class Silent:
    """A function of a library that would launch; without a driver it would return an error."""

    def __call__(self, *_: Any) -> int:
        """No error."""
        return 0


def _silenced(made: Any) -> Any:
    """A library of csrc that launches nothing; what it says of itself is asked as ever."""
    for name in ("sarqc_columns", "sarqc_gemv"):
        if hasattr(made, name):
            setattr(made, name, Silent())
    return made


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _in_its_place(*_: Any, **__: Any) -> Any:
    return nullcontext()


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: GPU,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(
        name=GPU, major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, L2_cache_size=60 << 20
    ),
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "is_bf16_supported": lambda *_: True,
    "is_current_stream_capturing": lambda: False,
    "current_stream": lambda *_: SimpleNamespace(cuda_stream=0, synchronize=_nothing),
    "graph_pool_handle": lambda: (0, 0),
    "Event": Event,
    "CUDAGraph": Graph,
    **dict.fromkeys(("graph", "device", "device_of", "stream"), _in_its_place),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 0),
    **dict.fromkeys(
        ("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "set_sync_debug_mode", "manual_seed",
         "manual_seed_all", "reset_peak_memory_stats"), _nothing,
    ),
}  # fmt: skip
"""Of torch.cuda, what asks the driver."""


LAYERS = 2
"""Of whole models: the others launch the same."""

SLOW = {"reference", "eager"}
"""Words in the names of contenders that take many thousands of launches, which take a host seconds without a card."""


GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


def _guard() -> None:
    """What torch asks to make a device the current one; a torch without CUDA has nothing to ask, and gets it here."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-o", str(made)]
        subprocess.run([cpu_build.compiler(), *flags, str(source), "-lc10"], check=True)
        ctypes.CDLL(str(made))


def _judged(error: Callable[..., float]) -> Callable[..., float]:
    """Runs, and is content with what it finds."""
    return lambda *given: 0.0 * error(*given)


def _address(tensor: Any) -> int:
    return ADDRESS + int(tensor.storage_offset()) * int(tensor.element_size())


def begin() -> None:
    """From now on this process has an H200, in all its threads."""
    mode, run = Numbers(), threading.Thread.run  # first: torch looks at itself when it makes the first such mode
    from benchmarks import fake_gpu
    from benchmarks.decode import command as decode
    from benchmarks.ops import OPS
    from benchmarks.quantize.shapes import MODELS
    from sarqc.checkpoint.formats import compressed_tensors
    from sarqc.pipeline.verify import Verified
    from sarqc_kernels import build
    from sarqc_kernels.w4a16 import experts, matmul, routing

    def with_mode(self: threading.Thread) -> None:
        with mode:
            run(self)

    library = functools.cache(lambda *given, library=build.library: _silenced(library(*given)))
    for place, name, value in (
        *((torch.cuda, name, value) for name, value in CUDA.items()),
        *((module, "takes_fast_path", lambda _: True) for module in (experts, matmul, routing)),
        (torch, "Generator", Generator),
        (threading.Thread, "run", with_mode),
        (fake_tensor, "init_gpu_context", _nothing),
        (FakeTensor, "data_ptr", _address),
        (FakeTensorMode, "avoid_device_init", True),
        (build, "library", library),
        (build, "_check_ready", _nothing),
        (decode.models, "by_reference", nullcontext),  # it has thousands of launches too
        (compressed_tensors, "check_weight", _nothing),  # checks of numbers, as is the next
        (Verified, "require", _nothing),
    ):
        setattr(place, name, value)
    for op in (*OPS.values(), decode.OP):
        object.__setattr__(op, "error", _judged(op.error))
        object.__setattr__(op, "contenders", [each for each in op.contenders if not SLOW & {*each.name.split()}])
    for _, sizes in MODELS.values():
        sizes["num_hidden_layers"] = min(LAYERS, sizes["num_hidden_layers"])
    fake_gpu.become(fake_gpu.H200)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes a tensor on the host and then moves it
    _guard()
    mode.__enter__()
