"""One writer per folder: a lock that dies with its process, and a note of who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from sdxl_ambient.errors import LockedError
from sdxl_ambient.provenance import is_temporary, write_json

LOCK, OWNER = ".lock", ".lock.json"


@contextmanager
def locked(folder: str | Path, log: Callable[[str], None] = print, *, hold: bool = True) -> Iterator[None]:
    """Hold a folder, which is made if it isn't there, so that no second run writes into it.

    One process of a run holds it. With ``hold`` false nothing is done, for the run's others. The operating system frees the
    lock when its process ends, however it ends; ``log`` is told where that was without a word.

    Raises:
        LockedError: another run holds it; the message has its host, its process and since when.
        OSError: the folder can't be made or written.
    """
    if not hold:
        yield
        return
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK, timeout=0, thread_local=False), folder / OWNER
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(f"{folder} is being written by {_told(owner)}; wait for its end, or use another folder") from None
    try:
        if owner.exists():
            log(f"note: {folder} was being written by {_told(owner)}, which ended without a word; going on from there")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(owner, {"host": socket.gethostname(), "process": os.getpid(), "since": now})
        yield
    finally:
        owner.unlink(missing_ok=True)
        if new and [path.name for path in folder.iterdir()] == [LOCK]:
            # Nothing was made, so nothing stays.
            (folder / LOCK).unlink()
            folder.rmdir()
        lock.release()


def is_empty(folder: Path) -> bool:
    """Whether a folder has nothing in it but a lock and what writes that were cut off left, or isn't there."""
    return not folder.is_dir() or all(path.name in (LOCK, OWNER) or is_temporary(path) for path in folder.iterdir())


def _told(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {int(who['process'])} on {str(who['host'])[:80]} since {str(who['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another run, which didn't say who it is"
