"""Memory of processes, and work in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def resident(field: str, process: int | str = "self") -> int:
    """Bytes of a process that are resident (VmRSS), or were at most (VmHWM); Linux."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(run: Callable[[], Result]) -> tuple[int, int, Result]:
    """Growth of the peak resident size during ``run()`` in bytes, the peak itself, and what ``run()`` returned; Linux."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what came before may have left memory to reuse
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM")
    return peak - before, peak, result


def in_a_process(function: Callable[..., Result], *args) -> Result:
    """``function(*args)``, computed in a new process whose memory nothing else has used."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)
