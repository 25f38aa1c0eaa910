"""What the libraries' loaders raise, and what their versions call things."""

from __future__ import annotations

import diffusers
import torch
from safetensors import SafetensorError

# Of damaged files: a configuration of other types is a TypeError or an AttributeError somewhere in the libraries.
LOADING_ERRORS = (
    OSError, SafetensorError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError, MemoryError
)  # fmt: skip


def in_precision(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword for ``from_pretrained`` of diffusers, which took another name for it before 0.42."""
    recent = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)
    return {"dtype" if recent else "torch_dtype": dtype}
