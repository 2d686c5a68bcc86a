"""Every kernel that the operations launch, as they launch it: on a GPU that is not there.

`launches` has calls of the package's own launch code for each operation. Here they run with Triton's compiler held
back: a hook notes what it would have compiled, which `compiler` does later, one process for each core.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton import knobs

from benchmarks import fake_gpu
from sarqc_kernels.aot import ARCHS
from sarqc_kernels.device import Device

__all__ = ["ROOMS", "AotJob", "Launch", "collect"]

ROOMS = ("gram", "columns", "w4a16", "dequant")


@dataclass(frozen=True)
class Launch:
    """A call that launches kernels. name: of what it varies. wanted: instructions that the code of a kernel must hold,
    by the kernel's name, such as "HGMMA" or "HGMMA from registers" (then all of them)."""

    name: str
    call: Callable[[], object]
    wanted: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class AotJob:
    """One kernel to compile, as Triton asked for it.

    signature, constants, attributes: of `ASTSource`. options: num_warps, num_stages and others of one launch.
    instructions: see `Launch.wanted`. Spills and shared memory are checked for every job.
    """

    name: str
    kernel: Any
    arch: int
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    instructions: Sequence[str]


def collect(rooms: Sequence[str] = (), match: str = "", archs: Sequence[int] = ()) -> list[AotJob]:
    """Jobs of `rooms`, for `archs` (empty: all) with `match` in the name. A kernel that several launches ask for has
    the name of the first; raises ValueError where two have one name, or a launch asks for none."""
    jobs = [job for arch in archs or ARCHS for room in rooms or ROOMS for job in _of_room(room, Device(arch, 132))]
    names = [(job.name, job.arch) for job in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two jobs have one name: {sorted(twice)}")
    return [job for job in jobs if match in job.name]


def _of_room(room: str, gpu: Device) -> Iterator[AotJob]:
    seen: set[tuple[str, str]] = set()
    for launch in importlib.import_module(f"benchmarks.aot.launches.{room}").launches(gpu):
        asked = asked_for(launch.call, gpu)
        if not asked:
            raise ValueError(f"{room} {launch.name} launches no kernel")
        for key, kernel, compile_ in asked:
            if (kernel.__name__, key) in seen:
                continue
            seen.add((kernel.__name__, key))
            short = kernel.__name__.strip("_").removesuffix("_kernel")
            options = json.loads(compile_["specialization_data"])["options"]
            yield AotJob(
                f"{room} {short} {launch.name}".strip(), kernel, gpu.arch, compile_["signature"], compile_["constants"],
                compile_["configs"][0], {name: options[name] for name in OPTIONS if options.get(name) is not None},
                launch.wanted.get(short, ()),
            )  # fmt: skip


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
"""Of a launch, those that decide what is compiled."""


def asked_for(call: Callable[[], object], gpu: Device) -> list[tuple[str, Any, dict[str, Any]]]:
    """(key, function, what a compiler would have got) of every kernel that a call launches on such a GPU."""
    items: list[tuple[str, Any, dict[str, Any]]] = []

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        items.append((key, fn.jit_function, compile))
        return True  # do not compile

    fake_gpu.become(gpu)
    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return items
