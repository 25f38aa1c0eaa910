"""The files of tensors that a store consists of: written whole or not at all, and never taken for another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdxl_ambient.errors import StoreError
from sdxl_ambient.provenance import atomic


def readable(path: Path, names: Sequence[str]) -> bool:
    """Whether a shard is there with exactly these tensors. A damaged one is a StoreError, not a reason to draw again."""
    if not path.exists():
        return False
    try:
        with safe_open(str(path), "pt") as file:
            if set(file.keys()) == set(names):
                return True
    except (SafetensorError, OSError):
        pass
    raise StoreError(f"{path} is damaged; drawing it anew would be a second observation of its images. Restore the file")


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a shard whole or not at all. A full disk is a StoreError; the shards before it stay."""
    try:
        with atomic(path) as temporary:
            save_file(tensors, str(temporary))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} can't be written: {error}; the same command goes on from here") from None
