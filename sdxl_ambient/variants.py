"""Variants of weight files: ``model.fp16.safetensors`` beside, or in place of, ``model.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path

_NAMES = (
    re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors"),
    re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(\w+))?\.json"),
)


def only_variant(folder: str | Path) -> str | None:
    """The one variant that a part's folder holds weights of, where it holds no others; None else."""
    names = [path.name for path in Path(folder).glob("*.safetensors*")]
    found = {match[1] for name in names for pattern in _NAMES if (match := pattern.fullmatch(name))}
    return next(iter(found)) if len(found) == 1 else None
