"""The one noise draw of each image: where its key lives, and how key and content become z.

z = SHAKE-256(key ‖ what ‖ content) read as normal numbers: a cryptographic stream, since the usual generators are seeded
with 32 or 64 bits, which can be tried one by one against a stored x_n. ``content`` is the hash of the picture's pixels and
``what`` the hash of all that shapes the latent, so that a draw depends on nothing else: not on the order of the images, the
batch, or how many processes there are; and the same picture at another noise level gets independent noise, since the same z
at two levels could simply be solved for the image.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtri

from sdxl_ambient.errors import NoiseKeyError

KEY_BYTES = 32


def noise_key(path: str | Path | None) -> bytes:
    """The key of a data set: from ``path`` (created with mode 600 if missing), or random and never written.

    Raises:
        NoiseKeyError: a file that is readable by others, too short, or can't be read or made.
    """
    if path is None:
        return secrets.token_bytes(KEY_BYTES)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return _read(path)
        with os.fdopen(descriptor, "w") as file:
            key = secrets.token_bytes(KEY_BYTES)
            file.write(key.hex() + "\n")
            return key
    except OSError as error:
        raise NoiseKeyError(f"--noise_key_file: {str(path)!r}: {error.strerror}") from None


def key_id(key: bytes) -> str:
    """Tells two keys apart without telling either: a one-way hash of 256 random bits."""
    return hashlib.sha256(b"sdxl_ambient key id|" + key).hexdigest()


def _read(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise NoiseKeyError(f"--noise_key_file: {str(path)!r} can be read by others; make it mode 600")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (UnicodeDecodeError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise NoiseKeyError(f"--noise_key_file: {str(path)!r} is not a key of {2 * KEY_BYTES} hexadecimal digits")
    return key


def draw_z(key: bytes, what: str, content: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of ``shape``, float64, a function of its arguments alone.

    52 bits of the stream make a uniform number at the middle of its cell, never 0 or 1, and the normal quantile function
    makes it normal.
    """
    count = int(np.prod(shape))
    stream = hashlib.shake_256(key + bytes.fromhex(what) + bytes.fromhex(content)).digest(8 * count)
    cells = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)
    uniform = (cells.astype(np.float64) + 0.5) * 2.0**-52
    return torch.from_numpy(ndtri(uniform)).reshape(shape)
