"""Provenance: hashes of inputs, versions of the software, and JSON that is written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import stat
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from sdxl_ambient import __version__
from sdxl_ambient.errors import JsonError

MOST_JSON = 1 << 30  # bytes; the plan of a store of a million pictures has less than half of it
_TEMPORARY = re.compile(r"\..+\.tmp(\.\w+)?")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "pillow")


def hash_bytes(data: bytes) -> str:
    """SHA-256 of a byte string, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, whatever device, file layout or order they came in."""
    import torch  # here for start-up time: JSON is read by commands that need no torch

    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` on success, remove it on failure.

    A reader sees the old file or the whole new one, also after a crash or a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique per writer, since several processes may write the same file; the suffix is kept for savers that look at it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is named as those are that a write which was cut off leaves."""
    return _TEMPORARY.fullmatch(path.name) is not None


def write_json(path: str | Path, value: Any) -> None:
    """Write standard JSON (NaN and infinity are refused with a ValueError), whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """Read a JSON file of at most ``most`` bytes.

    Raises:
        JsonError: it names the file; see :func:`parse_json`.
        OSError: a file that isn't there, or can't be read.
    """
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        # A pipe would be waited for.
        raise JsonError(f"{path} is not valid JSON: it is no file")
    if status.st_size > most:
        raise JsonError(f"{path} is not valid JSON: {status.st_size:,} bytes, more than the {most:,} that are read")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """Standard JSON: no NaN or infinity, no key twice in an object, no half of a surrogate pair.

    Args:
        text: bytes are UTF-8.
        source: what the message names.

    Raises:
        JsonError: anything else, or objects nested so deeply that Python can't hold them.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(
            decoded, parse_constant=_no_constant, parse_float=_finite_float, object_pairs_hook=_without_repeats
        )
        # UTF-8 has none, so that it must be spelled out.
        if (not isinstance(text, bytes) or _ESCAPED_SURROGATE.search(decoded)) and not _is_text(value):
            raise ValueError("half of a surrogate pair, which is no text")
    except UnicodeDecodeError as error:
        raise JsonError(f"{source} is not valid JSON: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise JsonError(f"{source} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise JsonError(f"{source} is not valid JSON: {error}") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {repeated[:60]!r} twice in one object")
    return value


def is_utf8(text: str) -> bool:
    """Whether a text can be written in UTF-8: not with half of a surrogate pair, as bytes of a file's name become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


CHECKSUM = "checksum"


def write_sealed(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the hash of its content as the field ``checksum``, whole or not at all."""
    content = {name: v for name, v in value.items() if name != CHECKSUM}
    write_json(path, {**content, CHECKSUM: hash_json(content)})


def read_sealed(path: str | Path) -> Any:
    """What :func:`write_sealed` wrote, without the checksum.

    Raises:
        ValueError: no JSON object, or not as it was written.
        KeyError: it has no checksum.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    seal = value.pop(CHECKSUM)
    if seal != hash_json(value):
        raise ValueError(f"{path} is not as it was written")
    return value


def _is_text(value: Any) -> bool:
    """Whether all texts in a JSON value can be written in UTF-8."""
    return is_utf8(json.dumps(value, ensure_ascii=False))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every leaf in which two manifests differ, as ``key: stored value, wanted value``."""
    found = []
    for key in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: stored {_shown(old)}, wanted {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:  # read from a file that nests further than it can be shown
        return "something nested deeply"


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with ``+`` when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty else "")


def processor() -> str:
    """The processor's model name, or the GPU's where there is one."""
    import torch  # here for start-up time

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor's model name, also where there is a GPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a result was made with: versions, processor, threads, commit."""
    import torch  # here for start-up time

    return {
        "sdxl_ambient": __version__,
        "versions": versions(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
