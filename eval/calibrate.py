"""Null distributions → thresholds and intervals: what similarity unrelated images reach, and how sure a count is."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

# (n + 1)·α is often meant to be a whole number (α = .02, n = 49) and comes out a rounding error below it.
_ROUNDING = 1e-9


class InsufficientData(ValueError):
    """Too few held-out images for the wanted false-alarm rate; the message says how many are needed."""


def smallest_null(alpha: float) -> int:
    """The number of held-out images from which a threshold at ``alpha`` exists: ⌈1/α − 1⌉."""
    return math.ceil(1 / alpha - 1 - _ROUNDING)


def threshold(null_similarities, alpha: float) -> float:
    """The similarity that an image unrelated to the training set exceeds with probability at most ``alpha``.

    τ_α = the ⌈(n + 1)(1 − α)⌉-th smallest of the n null similarities. If a new image is exchangeable with the null
    images, P(similarity > τ_α) ≤ α, whatever the distribution and for every n (split conformal prediction: Vovk,
    Gammerman & Shafer 2005, *Algorithmic Learning in a Random World*, §2.2).

    Args:
        null_similarities: array of shape (n,), each held-out image's similarity to its nearest training image.
        alpha: tolerated false-alarm rate, in (0, 1).

    Raises:
        InsufficientData: n < 1/α − 1, where the order statistic does not exist.
    """
    values = np.sort(np.asarray(null_similarities, dtype=np.float64).ravel())
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if not np.isfinite(values).all():
        raise ValueError("null similarities must be finite")
    if values.size < smallest_null(alpha):
        raise InsufficientData(
            f"{values.size} held-out images can not calibrate a false-alarm rate of {alpha:g}: "
            f"at least {smallest_null(alpha)} are needed"
        )
    return float(values[threshold_rank(values.size, alpha) - 1])


def threshold_rank(n: int, alpha: float) -> int:
    """⌈(n + 1)(1 − α)⌉, counted from 1, computed as n + 1 − ⌊(n + 1)α⌋."""
    return n + 1 - math.floor((n + 1) * alpha + _ROUNDING)


def clopper_pearson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval for a share, from ``count`` of ``n`` (Clopper & Pearson 1934, *Biometrika* 26).

    Lower end: the (1 − c)/2 quantile of Beta(count, n − count + 1); upper end: the (1 + c)/2 quantile of
    Beta(count + 1, n − count). 0 of n gives a lower end of 0, n of n an upper end of 1.
    """
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"a count between 0 and n ≥ 1 is needed, got {count} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(stats.beta.ppf(tail, count, n - count + 1))
    high = 1.0 if count == n else float(stats.beta.ppf(1 - tail, count + 1, n - count))
    return low, high
