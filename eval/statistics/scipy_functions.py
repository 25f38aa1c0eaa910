"""The few functions of scipy that the figures rest on, with their types.

scipy ships none, and a checker would know nothing of what comes out of them. What it can't know stays in this file.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.cluster import vq
from scipy.spatial import distance

Floats = npt.NDArray[np.float64]


def euclidean_distances(vectors: npt.ArrayLike) -> Floats:
    """Between all rows of (n, d), in float64: (n, n). Equal rows are exactly 0 apart."""
    rows = np.asarray(vectors, dtype=np.float64)
    return np.asarray(distance.cdist(rows, rows), dtype=np.float64)


def beta_quantile(q: float, a: float, b: float) -> float:
    """The ``q`` quantile of Beta(a, b)."""
    return float(stats.beta.ppf(q, a, b))


def normal_quantile(q: float) -> float:
    """The ``q`` quantile of the standard normal law."""
    return float(stats.norm.ppf(q))


def student_quantile(q: float, degrees: int) -> float:
    """The ``q`` quantile of Student's t with so many degrees of freedom."""
    return float(stats.t.ppf(q, degrees))


def ranks(values: Floats) -> Floats:
    """Each value's rank from 1, equal values their mean rank: (n,)."""
    return np.asarray(stats.rankdata(values), dtype=np.float64)


def mann_whitney_u(x: Floats, y: Floats) -> float:
    """Σ_ij [x_i > y_j] + ½[x_i = y_j], of arrays (m,) and (n,)."""
    # The method is that of the p-value, which nobody looks at: the cheap one.
    return float(stats.mannwhitneyu(x, y, method="asymptotic").statistic)


def adjusted_p_values(p: Floats) -> Floats:
    """Benjamini and Hochberg's adjustment, min over k ≥ rank of m p_(k)/k: (m,)."""
    return np.asarray(stats.false_discovery_control(p), dtype=np.float64)


def k_means_centres(points: Floats, k: int, seed: int) -> Floats:
    """Centres (k, d) after 50 rounds from k-means++ starts."""
    # Its decorator takes ``seed`` for ``rng``, which would be another generator: other cells, other figures.
    centres, _ = vq.kmeans2(points, k, iter=50, minit="++", seed=seed)  # pyright: ignore[reportCallIssue]
    return np.asarray(centres, dtype=np.float64)
