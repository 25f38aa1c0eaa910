"""Loads one part of a model with the libraries' own loaders, and says in one line why it can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError

from sdxl_ambient.errors import ModelError, one_line

LOADING_ERRORS = (OSError, SafetensorError, ValueError, RuntimeError, LookupError)


def load_part(kind: Any, name_or_path: str | Path, what: str, **keywords: Any) -> Any:
    """``kind.from_pretrained`` with every failure turned into a one-line ModelError.

    Args:
        kind: a class of diffusers or transformers.
        what: the part's name in the message.
        keywords: for ``from_pretrained``; those that are None are left out.
    """
    try:
        return kind.from_pretrained(str(name_or_path), **{k: v for k, v in keywords.items() if v is not None})
    except LOADING_ERRORS as error:
        raise ModelError(f"the {what} of {str(name_or_path)!r} can't be loaded: {one_line(error)}") from None


def in_precision(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword for ``from_pretrained`` of diffusers, which took another name for it before 0.42."""
    recent = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)
    return {"dtype" if recent else "torch_dtype": dtype}


def load_config(kind: Any, name_or_path: str | Path, **keywords: str | None) -> dict[str, Any]:
    """``kind.load_config`` of a class of diffusers: the configuration alone. Errors are those of ``LOADING_ERRORS``."""
    return dict(kind.load_config(str(name_or_path), **keywords))
