"""Writes safetensors files and folders whole or not at all, and reads the weights of a pipeline's part."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import InterchangeError, one_line
from sdxl_ambient.formats.find import part_files
from sdxl_ambient.formats.record import DAMAGED_FILE
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.provenance import atomic

_NO_HASH = "0" * 64
_HASH = "modelspec.hash_sha256"


def write_tensors(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all, with the SHA-256 of its tensors in its metadata.

    ``modelspec.hash_sha256`` as ModelSpec defines it, of all bytes after the header; ``sshs_model_hash`` is kohya's name for
    the same.
    """
    with atomic(path) as temporary:
        save_with_hash(temporary, state, metadata)


def save_with_hash(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write the same in place."""
    hashes = {_HASH: f"0x{_NO_HASH}", "sshs_model_hash": _NO_HASH}
    save_file(state, str(path), metadata={**metadata, **hashes})
    _fill_in_hash(path)


def check_hash(path: Path) -> bool:
    """Whether a file of weights has its hash in its metadata; False where it has none.

    Raises:
        InterchangeError: the tensors are not as they were written, or the file can't be read.
    """
    try:
        with safe_open(str(path), "pt") as file:
            wanted = (file.metadata() or {}).get(_HASH)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while piece := file.read(1 << 20):
                digest.update(piece)
    except DAMAGED_FILE as error:
        raise InterchangeError(f"{path} can't be read: {one_line(error)}") from None
    if wanted is None:
        return False
    if wanted != f"0x{digest.hexdigest()}":
        raise InterchangeError(f"{path} is damaged: its weights are not as they were written")
    return True


def _fill_in_hash(path: Path) -> None:
    """Put the hash in the place that the header has for it, which lies before what is hashed."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header, digest = file.read(length), hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        file.seek(8)
        file.write(header.replace(_NO_HASH.encode(), digest.hexdigest().encode()))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """The same file by another name, or a copy where the file system has no such thing or another disk is meant."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def part_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one part of a pipeline, as they are stored, all finite. Raises InterchangeError."""
    state: dict[str, torch.Tensor] = {}
    for file in part_files(folder):
        if file.suffix == ".safetensors":
            state.update(read_tensors(file))
    return state


def read_tensors(file: Path, besides: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, all finite.

    Args:
        besides: the ending of names that the reader looks at itself.

    Raises:
        InterchangeError: unreadable, or NaN or infinity in it.
    """
    try:
        state = load_file(str(file))
    except DAMAGED_FILE as error:
        raise InterchangeError(f"{file} can't be read: {one_line(error)}") from None
    looked_at = ((n, t) for n, t in state.items() if besides is None or not n.endswith(besides))
    check_finite(looked_at, str(file), InterchangeError)
    return state


def check_files(files: Iterable[Path]) -> None:
    """The tensors of all .safetensors files among ``files`` are finite; one is held in memory at a time.

    Raises:
        InterchangeError: one that can't be read, or NaN or infinity in it.
    """
    for file in files:
        if file.suffix == ".safetensors":
            _check_file(file)


def _check_file(file: Path) -> None:
    try:
        with safe_open(str(file), "pt") as opened:
            check_finite(((name, opened.get_tensor(name)) for name in opened.keys()), str(file), InterchangeError)
    except InterchangeError:
        raise
    except DAMAGED_FILE as error:
        raise InterchangeError(f"{file} can't be read: {one_line(error)}") from None
