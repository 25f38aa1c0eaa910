"""Work shared over the processes that ``accelerate launch`` or ``torchrun`` started; with one process nothing changes.

Whole batches are dealt out, never parts of one, so that every number comes from the same arithmetic whatever the count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.environment import parse_flag_from_env

from sdxl_ambient.devices import locked_by_main

T = TypeVar("T")


def _state() -> PartialState:
    """The one state that there is; asked for anew, since it can be reset."""
    # Without a word on the CPU, PartialState leaves processes that torchrun started there unaware of each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available()))


def is_main() -> bool:
    """Whether this process is the one that writes reports and shows progress."""
    return _state().is_main_process


def count() -> int:
    """How many processes share the work."""
    return _state().num_processes


def share(items: Sequence[T]) -> list[T]:
    """This process's items: every ``count()``-th."""
    return list(items)[_state().process_index :: count()]


@contextmanager
def locked_output(folder: str | Path) -> Iterator[None]:
    """Hold an output folder, so that no second run writes into it. Raises LockedError in every process."""
    with locked_by_main(folder, print, _state()):
        yield


def wait() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def collect(items: Sequence[T]) -> list[T]:
    """The inverse of :func:`share`: everyone's items, in the order they were dealt out. Same result in every process."""
    if count() == 1:
        return list(items)
    parts = gather_object([list(items)])
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
