"""Scores that an earlier run left in JSON files: read again only where they are what that run must have written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_ambient.errors import StageError
from sdxl_ambient.provenance import read_sealed


def read_object(path: Path, keys: Iterable[str], advice: str) -> dict[str, Any]:
    """A JSON object of a file that ``write_sealed`` wrote, in which each of ``keys`` is an object again.

    Args:
        advice: what the message says at its end, such as "delete that file and run again".

    Raises:
        StageError: a damaged file, or one of something else; the message names it.
    """
    try:
        content = read_sealed(path)
    except KeyError:
        raise StageError(f"{path} has no checksum, as files of earlier versions; {advice}") from None
    except ValueError as error:
        raise StageError(f"{error}; {advice}") from None
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), dict)]
    if missing:
        raise StageError(f"{path} is damaged: it has no {missing[0]}; {advice}")
    return content


def arrays(values: Mapping[str, Any], path: Path, advice: str, lengths: Iterable[int]) -> dict[str, np.ndarray]:
    """Lists of finite numbers by name, as float64 arrays of one length.

    Args:
        values: from :func:`read_object`.
        lengths: what their length may be.

    Raises:
        StageError: lists of other lengths, or of something else.
    """
    numbers = {name: _array(value) for name, value in values.items()}
    wrong = [name for name, array in numbers.items() if array is None]
    sizes = {len(array) for array in numbers.values() if array is not None}
    if not numbers or wrong:
        raise StageError(f"{path} is damaged: {wrong[0] if wrong else 'what it keeps'!r} is not a list of numbers; {advice}")
    if len(sizes) > 1 or not sizes <= set(lengths):
        raise StageError(f"{path} is damaged: its lists of numbers are {min(sizes)} to {max(sizes)} long; {advice}")
    return {name: array for name, array in numbers.items() if array is not None}


def _array(value: object) -> np.ndarray | None:
    if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
        return None
    try:
        array = np.array(value, np.float64)
    except OverflowError:
        return None
    return array if all(map(math.isfinite, array)) else None
