"""Settings of the parts of a training run, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RestoreOptions:
    """``batch_size`` restored samples in each forward pass; of those, ``refresh`` are drawn anew each time, by chains of
    ``steps`` evaluations; an image without a sample gets one when its turn comes. ``levels``: "low" trains them at
    t ≤ t_n, beside the ambient loss; "all" at every t, in its place."""

    batch_size: int
    refresh: int
    steps: int
    levels: str
