"""Loads one part of a model with the libraries' own loaders, and says in one line why it can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.libraries import LOADING_ERRORS
from sdxl_ambient.models.single_file import source_of
from sdxl_ambient.variants import only_variant

# Of parts whose every tensor is used. Text encoders' files may hold more: positions, or another's projection.
_NOTHING_MORE = (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)


def load_part(kind: Any, name_or_path: str | Path, what: str, **keywords: Any) -> Any:
    """``kind.from_pretrained`` with every failure turned into a one-line ModelError.

    Of a network all weights must be there and finite; the libraries draw missing ones at random, with a warning at most.
    Where a folder holds one variant of its weights alone (fp16), that is loaded. Of a single file only what has no weights
    is loaded here: its scheduler and its tokenizers.

    Args:
        kind: a class of diffusers or transformers.
        what: the part's name in the message.
        keywords: for ``from_pretrained``; those that are None are left out.
    """
    source, keywords = f"the {what} of {str(name_or_path)!r}", {k: v for k, v in keywords.items() if v is not None}
    more: dict[str, Any] = {"output_loading_info": True} if _is_network(kind, torch.nn.Module) else {}
    folder = Path(name_or_path) / (keywords.get("subfolder") or "")
    if more and "variant" not in keywords and (variant := only_variant(folder)) is not None:
        keywords["variant"] = variant
    origin, overrides = source_of(name_or_path, keywords.get("subfolder"))
    try:
        loaded = kind.from_pretrained(origin, **{**overrides, **keywords}, **more)
    except LOADING_ERRORS as error:
        raise ModelError(f"{source} can't be loaded: {one_line(error)}") from None
    if not more:
        return loaded
    network, report = loaded
    check_report(report, source, nothing_more=_is_network(kind, *_NOTHING_MORE))
    check_finite(network.state_dict(), source)
    return network


def _is_network(kind: Any, *classes: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, classes)


def check_report(report: dict[str, Any], source: str, *, nothing_more: bool = False) -> None:
    """Every weight of a network came from its file, and, with ``nothing_more``, the file holds no other. Raises ModelError.

    Args:
        report: what ``from_pretrained`` returns with ``output_loading_info``.
        source: what the message names first.
    """
    kinds = {"missing_keys": "missing", "mismatched_keys": "of another shape", "unexpected_keys": "unknown"}
    for key, problem in kinds.items():
        # A mismatched one comes with both shapes.
        names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in report.get(key) or ())
        if names and (nothing_more or key != "unexpected_keys"):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{source} can't be used: {names[0]}{more} {'are' if more else 'is'} {problem}")


def load_config(kind: Any, name_or_path: str | Path, **keywords: str | None) -> dict[str, Any]:
    """``kind.load_config`` of a class of diffusers: the configuration alone, of a single file what it stands for.

    Errors are those of ``LOADING_ERRORS``, of a single file ModelError.
    """
    source, overrides = source_of(name_or_path, keywords.get("subfolder"))
    return dict(kind.load_config(source, **keywords)) | overrides
