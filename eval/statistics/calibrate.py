"""Null distributions → thresholds and intervals: what similarity unrelated images reach, and how sure a count is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.statistics.scipy_functions import Floats, adjusted_p_values, beta_quantile

# (n + 1)·α is often meant to be a whole number (α = .02, n = 49) and comes out a rounding error below it.
_ROUNDING = 1e-9


class InsufficientData(ValueError):
    """Too few held-out images for the wanted false-alarm rate; the message says how many are needed."""


@dataclass(frozen=True)
class Estimate:
    """``value`` with its two-sided interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MonteCarlo:
    """How an interval is simulated: the number of draws, and the seed they come from."""

    draws: int = 200_000
    seed: int = 0


def smallest_null(alpha: float) -> int:
    """The number of held-out images from which a threshold at ``alpha`` exists: ⌈1/α − 1⌉."""
    return math.ceil(1 / alpha - 1 - _ROUNDING)


def threshold(null_similarities: npt.ArrayLike, alpha: float) -> float:
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


def clopper_pearson(count: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval for a share, from ``count`` of ``n`` (Clopper & Pearson 1934, *Biometrika* 26).

    Both may be effective counts (:func:`effective_count`), as Korn & Graubard 1998, *Survey Methodology* 24, use them.

    Lower end: the (1 − c)/2 quantile of Beta(count, n − count + 1); upper end: the (1 + c)/2 quantile of
    Beta(count + 1, n − count). 0 of n gives a lower end of 0, n of n an upper end of 1.
    """
    # Not scipy's binomtest, which takes whole counts alone.
    count = n if n < count <= n * (1 + _ROUNDING) else count  # shares of effective counts round
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"a count between 0 and n ≥ 1 is needed, got {count} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else beta_quantile(tail, count, n - count + 1)
    high = 1.0 if count == n else beta_quantile(1 - tail, count + 1, n - count)
    return low, high


def share_difference(count_a: float, n_a: float, count_b: float, n_b: float, confidence: float = 0.95) -> Estimate:
    """The difference of two shares, a − b, with its interval.

    d − √((a − l_a)² + (u_b − b)²) to d + √((u_a − a)² + (b − l_b)²) from each share's own interval (l, u), the method of
    variance estimates recovery (Newcombe 1998, *Statistics in Medicine* 17, method 10; Zou & Donner 2008, ibid. 27), with
    Clopper–Pearson's for Wilson's. It does not collapse where both shares are 0. The two are taken for independent; images
    drawn from the same prompts and seeds agree, which makes it too wide rather than too narrow.

    Raises:
        ValueError: impossible counts.
    """
    a, b = count_a / n_a, count_b / n_b
    (low_a, high_a), (low_b, high_b) = clopper_pearson(count_a, n_a, confidence), clopper_pearson(count_b, n_b, confidence)
    down, up = math.hypot(a - low_a, high_b - b), math.hypot(high_a - a, b - low_b)
    return Estimate(a - b, max(-1.0, a - b - down), min(1.0, a - b + up))


def conformal_p_values(similarities: npt.ArrayLike, null_similarities: npt.ArrayLike) -> Floats:
    """p_i = (1 + #{null ≥ s_i}) / (n + 1) for each of m similarities: (m,), in [1/(n + 1), 1].

    If image i is exchangeable with the n null images, P(p_i ≤ a) ≤ a for every a (Vovk et al. 2005, §2.2; Bates et al.
    2023, arXiv 2104.08279, eq. 1, for testing many images against one null).

    Raises:
        ValueError: a value that is not finite, or an empty null.
    """
    values = np.asarray(similarities, dtype=np.float64).ravel()
    null = np.sort(np.asarray(null_similarities, dtype=np.float64).ravel())
    if not null.size:
        raise ValueError("null similarities must not be empty")
    if not (np.isfinite(values).all() and np.isfinite(null).all()):
        raise ValueError("similarities must be finite")
    at_least = null.size - np.searchsorted(null, values, side="left")
    return (1 + at_least) / (null.size + 1)


def benjamini_hochberg(p_values: npt.ArrayLike, q: float) -> npt.NDArray[np.bool_]:
    """Which of m p-values are discoveries at false discovery rate ``q``: booleans (m,).

    The largest k with p_(k) ≤ q k/m, and all p-values up to it (Benjamini & Hochberg 1995, *JRSS B* 57). Conformal
    p-values of one null are positively dependent, for which the rate still holds (Bates et al. 2023, Theorem 2).

    Raises:
        ValueError: p-values outside [0, 1], or q outside (0, 1).
    """
    p = np.asarray(p_values, dtype=np.float64).ravel()
    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, got {q}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie between 0 and 1")
    return adjusted_p_values(p) <= q


def effective_count(flags: npt.ArrayLike, clusters: npt.ArrayLike) -> float:
    """Independent images that ``flags`` (m,) booleans are worth, where images of one cluster (a prompt) resemble each other.

    m divided by the design effect: the variance of the mean by clusters (ratio estimator, Cochran 1977, *Sampling
    Techniques*, §3.12) over that of independent images, never below 1. Equal flags throughout tell nothing of it; then m
    is the number of clusters.

    Raises:
        ValueError: no flags, or not one cluster for each.
    """
    values, labels = np.asarray(flags, dtype=np.float64), np.asarray(clusters)
    if values.ndim != 1 or values.size == 0 or values.shape != labels.shape:
        raise ValueError(f"flags and clusters of one length are needed, got shapes {values.shape} and {labels.shape}")
    _, which = np.unique(labels, return_inverse=True)
    groups, mean, m = int(which.max()) + 1, values.mean(), values.size
    if groups == m:
        return float(m)
    if groups == 1 or mean in (0.0, 1.0):
        return float(groups)
    residual = np.bincount(which, weights=values - mean)
    by_clusters = groups / (groups - 1) * (residual**2).sum() / m**2
    return float(m / max(1.0, by_clusters / (mean * (1 - mean) / m)))


def cluster_bootstrap(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike,
    statistic: Callable[[npt.NDArray[Any]], npt.ArrayLike] = np.mean,
    repetitions: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval (low, high) of ``statistic`` of ``values`` (m, …) when whole clusters are drawn with replacement.

    Field & Welsh 2007, *JRSS B* 69, §2 (randomised cluster bootstrap). Too narrow with few clusters (below about 20) and
    for shares near 0 or 1; for shares there is :func:`copied_share`.

    Raises:
        ValueError: no values, or not one cluster for each.
    """
    # Not scipy's bootstrap, which draws single values and knows no clusters.
    samples: npt.NDArray[Any] = np.asarray(values)
    labels = np.asarray(clusters)
    if len(samples) == 0 or len(samples) != len(labels):
        raise ValueError(f"values and clusters of one length are needed, got {len(samples)} and {len(labels)}")
    _, which = np.unique(labels, return_inverse=True)
    members: list[npt.NDArray[np.intp]] = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
    generator = np.random.default_rng(seed)
    statistics: list[npt.ArrayLike] = []
    for _ in range(repetitions):
        drawn: list[int] = generator.integers(len(members), size=len(members)).tolist()
        statistics.append(statistic(samples[np.concatenate([members[i] for i in drawn])]))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(statistics), [tail, 1 - tail])
    return float(low), float(high)


def copied_share(
    above: float,
    n: float,
    recalled: int,
    planted: int,
    n_null: int,
    alpha: float,
    confidence: float = 0.95,
    simulation: MonteCarlo = MonteCarlo(),
) -> Estimate:
    """The share of generated images that are copies, from how many lie above the threshold τ_α.

    If a share p are copies, of which the threshold recalls ρ, and the others exceed it with probability f, the rate above
    it is p ρ + (1 − p) f, so p = (rate − f)/(ρ − f) (Rogan & Gladen 1978, *Am. J. Epidemiol.* 107). Its value takes the
    shares as they are and f = α. The interval carries all three uncertainties through: rate ~ Beta(above + ½, n − above +
    ½) and ρ ~ Beta(recalled + ½, planted − recalled + ½) (Jeffreys), and f ~ Beta(n_null + 1 − rank, rank), the law of
    what a threshold at the rank-th of n_null null values really lets through (an order statistic of uniform variables).
    Both are kept within [0, 1]; copies that the threshold can't tell from others (ρ ≤ f) leave every share possible.

    Args:
        above: images above τ, of ``n``; both may be effective counts (:func:`effective_count`).
        recalled, planted: known copies above τ, and known copies.
        n_null: null similarities that the threshold was made from.
        simulation: the draws that the interval is made of.

    Raises:
        ValueError: counts outside their ranges.
        InsufficientData: n_null is too small for alpha.
    """
    if not (0 <= above <= n and n > 0 and 0 <= recalled <= planted and planted > 0):
        raise ValueError(f"{above} of {n} images and {recalled} of {planted} planted copies are impossible counts")
    if n_null < smallest_null(alpha):
        raise InsufficientData(f"{n_null} held-out images can not calibrate a false-alarm rate of {alpha:g}")
    rank, draws = threshold_rank(n_null, alpha), simulation.draws
    generator = np.random.default_rng(simulation.seed)
    rate = generator.beta(above + 0.5, n - above + 0.5, draws)
    recall = generator.beta(recalled + 0.5, planted - recalled + 0.5, draws)
    false = generator.beta(n_null + 1 - rank, rank, draws)
    tail = (1 - confidence) / 2
    gap = recall - false
    # No image above τ is compatible with p = 0 whatever the draws say, and every image with p = 1.
    shares = np.where(gap > 0, np.clip((rate - false) / np.where(gap > 0, gap, 1), 0, 1), np.nan)
    low = float(np.quantile(np.nan_to_num(shares, nan=0.0), tail))
    high = float(np.quantile(np.nan_to_num(shares, nan=1.0), 1 - tail))
    recall_seen = recalled / planted
    value = (above / n - alpha) / (recall_seen - alpha) if recall_seen > alpha else 0.0
    return Estimate(float(np.clip(value, 0, 1)), 0.0 if above == 0 else low, high)
