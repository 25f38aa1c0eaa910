"""The secret key of the noise: kept in the user's configuration folder, in a file of its own, or written nowhere."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sdxl_ambient.errors import NoiseKeyError, RegisterError, UserError
from sdxl_ambient.home import KEY_BYTES, home, secret, secret_file
from sdxl_ambient.store.register import KEPT, open_register


@dataclass(frozen=True)
class NoiseKey:
    """A key, and whether it is kept anywhere, so that the same noise can be made again. It is never printed."""

    secret: bytes
    kept: bool

    def __repr__(self) -> str:
        return f"NoiseKey(kept={self.kept})"

    @property
    def id(self) -> str | None:
        """Tells kept keys apart without telling any: a one-way hash of 256 random bits. None for one that isn't kept."""
        return hashlib.sha256(b"sdxl_ambient key id|" + self.secret).hexdigest() if self.kept else None


def kept_path() -> Path:
    """The file of the key that is used by default."""
    return home() / KEPT


def noise_key(which: str = "kept", file: str | Path | None = None) -> NoiseKey:
    """The key of ``--noise_key`` and ``--noise_key_file``, made if there is none.

    Args:
        which: "kept" for the one in the configuration folder, "none" for a random one that is never written.
        file: another file, mode 600, in place of the kept one.

    Raises:
        NoiseKeyError: a file that is readable by others, is no key, or can't be read or made.
    """
    if which == "none":
        return NoiseKey(secrets.token_bytes(KEY_BYTES), kept=False)
    try:
        return NoiseKey(_kept() if file is None else secret_file(Path(file)), kept=True)
    except RegisterError:
        raise
    except (UserError, OSError) as error:
        option = "--noise_key kept" if file is None else "--noise_key_file"
        raise NoiseKeyError(f"{option}: {error}") from None


def _kept() -> bytes:
    if not kept_path().exists():
        with open_register():  # which is made first, so that a key without one tells of a loss
            pass
    return secret(KEPT)


def shared_key(which: str, file: str | Path | None, state: PartialState) -> NoiseKey:
    """:func:`noise_key` of the main process, on every process. All call it; the others read no file."""
    found: list[NoiseKey | str | None] = [None]
    if state.is_main_process:
        try:
            found = [noise_key(which, file)]
        except UserError as error:
            found = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], NoiseKey):
        return found[0]
    raise NoiseKeyError(found[0])
