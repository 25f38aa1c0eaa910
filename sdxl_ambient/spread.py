"""A few of many, evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, at most all of them, evenly spaced from the first one on."""
    size = min(count, len(items))
    return [items[i * len(items) // size] for i in range(size)]
