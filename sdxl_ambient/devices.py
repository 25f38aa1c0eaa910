"""Where and in which precision networks run: choice and check of the device, one network on it at a time, processes."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from sdxl_ambient.errors import LockedError, OptionError, ProbeError
from sdxl_ambient.locks import locked

Network = TypeVar("Network", bound=torch.nn.Module)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_device(device: str) -> None:
    """Whether ``--device`` is auto, cpu, or a CUDA GPU that is there and that torch can use.

    Raises:
        OptionError: another kind of device, or a GPU that isn't there.
    """
    try:
        parsed = torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise OptionError(f"--device: {device!r} is not one of auto, cpu, cuda, cuda:N")
    # A driver that torch can't use may count GPUs all the same.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise OptionError(f"--device: {device!r} is not there; this machine has {count} CUDA GPUs")


def resolve_device(device: str) -> torch.device:
    """The device that an option names; of ``auto`` a GPU where there is one, else the CPU."""
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


class Placement:
    """Puts one network at a time on the device, so that its memory holds the larger, not the sum. On a CPU does nothing.

    Attributes:
        device: where networks are put.
        there: the network that is on it now; None for none.
    """

    device: torch.device
    there: torch.nn.Module | None

    def __init__(self, device: torch.device):
        self.device, self.there = device, None

    def use(self, module: Network) -> Network:
        """The module, on the device; the one that was there goes to the CPU's memory."""
        if self.there is not module:
            self.clear()
            self.there = module.to(self.device)
        return module

    def clear(self) -> None:
        """Nothing on the device."""
        if self.there is not None and self.device.type == "cuda":
            self.there.to("cpu")
            torch.cuda.empty_cache()
        self.there = None


def one_process(device: torch.device) -> PartialState:
    """The state of a lone process. Several would write the same files, so they are refused.

    Raises:
        ProbeError: several processes were started.
    """
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        raise ProbeError("this is made by one process; start it with python -m")
    return state


def processes() -> PartialState:
    """The processes that a command which makes a store was started with."""
    # Without a word on the CPU, PartialState leaves processes that torchrun started there unaware of each other.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available())
    # One process may prepare a data set, or have the larger pictures, for longer than the usual ten minutes.
    return PartialState(cpu=cpu, timeout=datetime.timedelta(hours=6))


class Processes(Protocol):
    """Accelerate's view of a run's processes, as an Accelerator or a PartialState has it."""

    @property
    def is_main_process(self) -> bool: ...
    @property
    def num_processes(self) -> int: ...


@contextmanager
def locked_by_main(folder: str | Path, log: Callable[[str], None], state: Processes) -> Iterator[None]:
    """:func:`sdxl_ambient.locks.locked` by the main process of a run; its others wait for that, or fail with it."""
    with ExitStack() as stack:
        failure = None
        try:
            stack.enter_context(locked(folder, log, hold=state.is_main_process))
        except (LockedError, OSError) as error:
            failure = str(error)
        if state.num_processes > 1:
            failure = gather_object([failure])[0]
        if failure is not None:
            raise LockedError(failure)
        yield
