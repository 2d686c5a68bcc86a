"""Parts of a call into C++ at once, on the threads that torch has.

Threads of our own would cost 0.1 ms to start, for a call of one, and while torch's wait awake for its next loop, each
would share its core with one of them. Where torch does not use GNU's OpenMP, every part gets a new thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from sarqc_kernels import cpu_build
from sarqc_kernels.errors import BackendError

__all__ = ["in_parts"]


def in_parts(function: Callable[[object, int, int], None], call: ctypes.Structure, parts: int) -> None:
    """`function`(call, part, parts) for every part. Parts are independent, and nothing of Python is held meanwhile.

    function: of a library of `cpu_build.library`.
    """
    if parts == 1:
        function(ctypes.byref(call), 0, 1)
    elif run := _team():
        run(function, ctypes.byref(call), parts)
    else:
        _in_threads(function, call, parts)


def _in_threads(function: Callable[[object, int, int], None], call: ctypes.Structure, parts: int) -> None:
    others = [threading.Thread(target=function, args=(ctypes.byref(call), part, parts)) for part in range(1, parts)]
    for thread in others:
        thread.start()
    function(ctypes.byref(call), 0, parts)
    for thread in others:
        thread.join()


@functools.cache
def _team() -> Callable[[object, object, int], None] | None:
    """What runs a function's parts on torch's threads; None where they are not GNU's."""
    openmp = _loaded_openmp()
    if openmp is None:
        return None
    try:
        run = cpu_build.library("parts_cpu").sarqc_in_parts
    except BackendError:
        return None
    run.argtypes, run.restype = (*[ctypes.c_void_p] * 5, ctypes.c_int64), None
    return functools.partial(run, openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads)


def _loaded_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP as torch has loaded it."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*")):
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        except (OSError, AttributeError):  # another one is loaded; no such mode on this system
            continue
    return None
