"""The user's own folder: secrets that no artefact holds, and the register of what was observed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_config_path

from sdxl_ambient.errors import OptionError, UserError

VARIABLE = "SDXL_AMBIENT_HOME"
KEY_BYTES = 32
_WAIT = 60.0  # seconds for another process that makes the same secret


def home() -> Path:
    """The folder of keys and register: ``SDXL_AMBIENT_HOME``, or the platform's folder of configurations."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else user_config_path("sdxl_ambient", appauthor=False)


def private_home() -> Path:
    """The same folder, made with mode 700 where it isn't there yet.

    Raises:
        UserError: a folder that can't be made or written.
    """
    folder = home()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be used ({error.strerror}); {VARIABLE} names another folder") from None
    return folder


def home_lock(wait: float = _WAIT) -> FileLock:
    """The lock on the folder, held while a secret or the register is made."""
    return FileLock(private_home() / ".lock", timeout=wait)


def check_home(*artefacts: str | Path | None) -> None:
    """Raises OptionError where the folder of keys lies inside something that is made to be shared."""
    here = home().resolve()
    for folder in filter(None, artefacts):
        if here.is_relative_to(Path(folder).resolve()):
            raise OptionError(
                f"{VARIABLE}: {str(home())!r} holds keys and lies inside {str(folder)!r}, which is made to be shared; keep "
                "it elsewhere"
            )


def secret(name: str) -> bytes:
    """The 32 secret bytes called ``name``, made once, however many processes ask at the same time.

    Raises:
        UserError: a file that others can read, that is no key, or that can't be read or made.
    """
    try:
        with home_lock():
            return secret_file(home() / name)
    except Timeout:
        raise UserError(f"{str(home())!r} is locked by another process for {_WAIT:.0f} s; try again") from None


def signing_key() -> bytes:
    """The key by which this user's own checkpoints are told from others'."""
    return secret("signing.key")


def secret_file(path: Path) -> bytes:
    """32 secret bytes from a file of 64 hexadecimal digits, which is made with mode 600 where there is none.

    Raises:
        UserError: a file that others can read, that is no key, or that can't be read or made. The message shows no key.
    """
    try:
        if not path.exists():
            _make(path)
        return _read(path)
    except OSError as error:
        raise UserError(f"{str(path)!r}: {error.strerror}") from None


def _make(path: Path) -> None:
    """Write a new key whole or not at all. Where another process was first, its key stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_bytes(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, it doesn't replace what is there
        except FileExistsError:
            pass
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise UserError(f"{str(path)!r} can be read by others; make it mode 600")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (UnicodeDecodeError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{str(path)!r} is not a key of {2 * KEY_BYTES} hexadecimal digits")
    return key
