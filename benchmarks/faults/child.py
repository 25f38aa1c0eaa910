"""Runs a command in a forked child, with a fault armed. The imports of torch and diffusers are paid once, by the parent."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.commands import Command, main_of

YEAR = 365 * 86400.0
_SAYS: dict[int, tuple[subprocess.Popen, Path]] = {}
_WRITES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "sqlite3.connect", "shutil.rmtree")


@dataclass(frozen=True)
class Armed:
    """What happens to a run: a signal at its n-th write or after some seconds, a limit on files' sizes, another clock."""

    number: int = 0  # the signal
    at_write: int = 0
    after: float = 0.0
    limit: int = 0  # bytes
    clock: float = 0.0  # seconds


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal; stderr; how many writes it made; its seconds."""

    code: int
    errors: str
    writes: int
    seconds: float


def preload() -> None:
    """Import what the commands import, once."""
    import torch

    torch.set_num_threads(1)
    for module in (
        "sdxl_ambient.latents", "sdxl_ambient.store.build", "train_sdxl_ambient", "sdxl_ambient.training.setup",
        "sdxl_ambient.training.step", "sdxl_ambient.training.resume", "sdxl_ambient.training.dry_run",
        "sdxl_ambient.hub.upload", "eval.generate", "eval.embed", "eval.attack", "eval.memorization", "eval.evaluation",
        "eval.reporting.page", "eval.settings", "sdxl_ambient.loop.run", "sdxl_ambient.loop.__main__",
    ):  # fmt: skip
        __import__(module)


def start(command: Command, case: Path, armed: Armed | None = None) -> int:
    """Fork a child that runs the command; its id."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        # Through another process: no limit on files' sizes may cut off what a run says at its end.
        path = case / f"stderr-{process}"
        with open(path, "wb") as file, open(reader, "rb") as source:
            _SAYS[process] = subprocess.Popen(["cat"], stdin=source, stdout=file), path
        return process
    os.dup2(writer, 2)
    code = 1
    try:
        code = _run(command, case, armed or Armed())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(process: int, case: Path, armed: Armed | None = None) -> Ended:
    """Until the child's end, or its time."""
    begun, sent = time.monotonic(), False
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        passed = time.monotonic() - begun
        if armed and armed.after and passed > armed.after and not sent:
            os.kill(process, armed.number)
            sent = True
        if passed > 120:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.003)
    says, path = _SAYS.pop(process)
    says.wait()
    errors = path.read_text(errors="replace")
    writes = int((case / f"writes-{process}").read_text() or 0) if (case / f"writes-{process}").exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), errors, writes, time.monotonic() - begun)


def _run(command: Command, case: Path, armed: Armed) -> int:
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["SDXL_AMBIENT_HOME"] = str(case / "home")
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if armed.clock:
        real = time.time
        time.time = lambda: real() + armed.clock
    counted = _count_writes(case, armed)
    if armed.limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (armed.limit, armed.limit))
    try:
        code = main_of(command.module)(command.argv(case))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    if not armed.limit:
        (case / f"writes-{os.getpid()}").write_text(str(counted[0]))
    return code


def _count_writes(case: Path, armed: Armed) -> list[int]:
    """Count what writes below the case, and send the signal at the write that is meant."""
    below, counted = str(case), [0]

    def hook(event: str, arguments: tuple) -> None:
        writing = event in _WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3)
        if not writing or not any(
            below in str(a) or str(a).startswith(("/proc/self/fd", ".latents", "latents-")) for a in arguments
        ):
            return
        counted[0] += 1
        if armed.at_write and counted[0] == armed.at_write:
            os.kill(os.getpid(), armed.number)

    sys.addaudithook(hook)
    return counted
