"""Look into stores of noisy latents."""

from pathlib import Path

import torch
from safetensors.torch import load


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """A shard in memory. (safetensors' own load_file maps the file, which these tests overwrite.)"""
    return load(path.read_bytes())


def latents_in(store: Path) -> dict[str, torch.Tensor]:
    """Every noisy latent of a store by the content of its picture."""
    return {k: v for path in sorted(store.glob("latents-*.safetensors")) for k, v in load_file(path).items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
