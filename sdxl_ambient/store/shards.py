"""The files of tensors that a store consists of: written whole or not at all, checked when they are read.

A shard's header has the SHA-256 of each of its tensors, under their names. Beside a shard of latents that is on disk lies
``NAME.sha256.json`` with the same hashes, until the manifest has them: a shard that is gone was drawn all the same.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sdxl_ambient.errors import StoreError, one_line
from sdxl_ambient.provenance import hash_tensors, is_temporary, read_json, write_json

MARK = ".sha256.json"
_FIELD = "sha256"


class Shard(Enum):
    """What is there of a shard."""

    MISSING = "missing"
    WHOLE = "whole"
    LARGER = "larger"  # with tensors that aren't wanted any more


def tensor_hash(name: str, tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's name, dtype, shape and bytes."""
    return hash_tensors({name: tensor})


def has_hashes(path: Path) -> bool:
    """Whether a file of tensors says that it has their hashes in its header. Raises StoreError where it can't be read."""
    try:
        with safe_open(str(path), "pt") as file:
            return _FIELD in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is damaged ({one_line(error)})") from None


def header_hashes(path: Path) -> dict[str, str]:
    """The hashes in a shard's header. Raises StoreError where it can't be read."""
    try:
        with safe_open(str(path), "pt") as file:
            found = json.loads((file.metadata() or {})[_FIELD])
            if not isinstance(found, dict) or found.keys() != set(file.keys()):
                raise ValueError("its hashes are not those of its tensors")
            return found
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({one_line(error)})") from None


def check_shard(path: Path, wanted: Mapping[str, str], sizes: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Raises StoreError where a tensor of a shard isn't there as it was written.

    ``sizes`` has the (height, width) in pixels of the pictures whose latents may be among them.
    """
    try:
        with safe_open(str(path), "pt") as file:
            for name, value in wanted.items():
                tensor = file.get_tensor(name)
                if tensor_hash(name, tensor) != value:
                    raise StoreError(f"{path} is damaged (the tensor {name[:12]} is not as it was written)")
                size = (sizes or {}).get(name)
                if size and not _fits(tensor, size):
                    raise StoreError(f"{path} is damaged (the latent {name[:12]} is not of the size in its time ids)")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is damaged ({one_line(error)})") from None


def _fits(latent: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether a latent is (4, height / f, width / f) of a picture's size in pixels, f whole: 8 for SDXL's VAE."""
    if latent.ndim != 3 or latent.shape[0] != 4 or 0 in latent.shape:
        return False
    factor = size[0] // latent.shape[1]
    return (factor * latent.shape[1], factor * latent.shape[2]) == size


def look_at(path: Path, names: Sequence[str], known: Mapping[str, str] | None = None) -> Shard:
    """What is there of a shard that has to hold ``names``, every bit checked against ``known`` or the hashes in its header.

    Raises:
        StoreError: damaged, which is no reason to draw again.
    """
    if not path.exists():
        return Shard.MISSING
    hashes = header_hashes(path)
    if lost := [name for name in names if name not in hashes]:
        raise StoreError(f"{path} is damaged (it lacks {len(lost)} of its {len(names)} tensors)")
    if any(hashes[name] != (known or hashes).get(name, hashes[name]) for name in names):
        raise StoreError(f"{path} is damaged (its hashes are not those that were recorded)")
    check_shard(path, {name: hashes[name] for name in names})
    return Shard.LARGER if len(hashes) > len(names) else Shard.WHOLE


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a new shard whole or not at all; what is there by its name is replaced. Returns the hashes of its tensors.

    An interrupted write leaves nothing: the file has no name before it is whole. (Where the file system can't do that, a
    file that :func:`remove_leftovers` finds.) A full disk is a StoreError; the shards before it stay.
    """
    hashes = {name: tensor_hash(name, tensor) for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, save(tensors, metadata={_FIELD: json.dumps(hashes, sort_keys=True)}))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} can't be written: {one_line(error)}; the same command goes on from here") from None
    return hashes


def write_latent_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """:func:`write_shard`, and then the mark that it was drawn."""
    hashes = write_shard(path, tensors)
    write_mark(path, hashes)


def write_mark(path: Path, hashes: Mapping[str, str]) -> None:
    write_json(_mark(path), dict(hashes))


def read_mark(path: Path) -> dict[str, str] | None:
    """The hashes of a shard that was drawn; None where no mark says so.

    Raises:
        StoreError: a damaged mark.
    """
    if not _mark(path).exists():
        return None
    try:
        found = read_json(_mark(path))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise StoreError(f"{_mark(path)} is damaged ({one_line(error)}); delete it") from None
    return found


def remove_mark(path: Path) -> None:
    _mark(path).unlink(missing_ok=True)


def _mark(path: Path) -> Path:
    return path.with_name(path.name + MARK)


def prune(path: Path, names: Sequence[str]) -> None:
    """Write a shard anew with the tensors of these names alone, each byte as it was."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in names}
    write_latent_shard(path, tensors)


def remove_leftovers(folder: Path) -> int:
    """Delete the files of writes that were cut off, and say how many; the caller holds the folder's lock."""
    found = [path for path in folder.glob(".*") if path.is_file() and is_temporary(path)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _write_whole(path: Path, data: bytes) -> None:
    descriptor = _nameless(path.parent)
    if descriptor is None:
        _write_named(path, data)
        return
    try:
        _fill(descriptor, data)
        source = f"/proc/self/fd/{descriptor}"
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            temporary = f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
            os.link(source, temporary, dst_dir_fd=folder, follow_symlinks=True)
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.fsync(folder)
            os.close(folder)
    finally:
        os.close(descriptor)


def _nameless(folder: Path) -> int | None:
    """A file without a name, which is gone with the process; None where there is no such thing."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None or not os.path.exists("/proc/self/fd"):
        return None
    try:
        return os.open(folder, flag | os.O_WRONLY, 0o644)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return None
        raise


def _write_named(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _fill(descriptor, data)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
