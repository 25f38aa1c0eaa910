"""How sure an area under the ROC curve is, and the difference of two that were measured on the same images.

An attack's AUC is P(member > nonmember) + ½ P(member = nonmember) over the images of which these are a sample
(:func:`eval.metrics.roc_auc`). Its variance is that of DeLong, DeLong & Clarke-Pearson 1988, *Biometrics* 44, from each
score's placement among the other set's; scipy and scikit-learn give an area without its variance. Models that memorised
reach AUC 1, where the variance is estimated as 0 and an interval of ± z standard errors would claim certainty; the
intervals here never do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eval.quality import finite_array
from eval.statistics.scipy_functions import Floats, beta_quantile, normal_quantile, ranks, student_quantile

Placements = tuple[Floats, Floats]


def auc_interval(members: npt.ArrayLike, nonmembers: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """AUC and an interval that contains the true one with about ``confidence``, seldom less: (auc, low, high) in [0, 1].

    Clopper–Pearson with an effective number of trials, as Korn & Graubard 1998, *Survey Methodology* 24, make one from any
    variance: k = A(1 − A)/V, here times (z/t)² with t of min(m, n) − 1 degrees of freedom, low and high the tail quantiles
    of Beta(kA, k(1 − A) + 1) and Beta(kA + 1, k(1 − A)). V is DeLong's, and k kept between two bounds where that is unsure:
    no fewer trials than min(m, n), since V ≤ A(1 − A)/min(m, n) for any scores (Birnbaum & Klose 1957, *Annals of
    Mathematical Statistics* 28), and no more than an uninformative score has, 3mn/(m + n + 1). With V = 0, as at AUC 1 or
    with all scores equal, k = min(m, n): at AUC 1, low = ((1 − confidence)/2)^(1/min(m, n)).

    Args:
        members, nonmembers: scores of shape (m,) and (n,), larger means member.

    Raises:
        ValueError: scores that are of another shape, empty or not finite; confidence outside (0, 1).
    """
    placed = _placements(members, nonmembers)
    auc = float(placed[0].mean())
    low, high = _bounds(auc, _covariance(placed, placed), len(placed[0]), len(placed[1]), _tail(confidence))
    return auc, low, high


def auc_difference(
    members_a: npt.ArrayLike,
    nonmembers_a: npt.ArrayLike,
    members_b: npt.ArrayLike,
    nonmembers_b: npt.ArrayLike,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """AUC of model a minus AUC of model b on the same images, with its interval: (difference, low, high) in [−1, 1].

    The limits are put together from those of both AUCs (:func:`auc_interval`) and DeLong's correlation ρ of the two, by
    Zou & Donner 2008, *Statistics in Medicine* 27:
    low = A_a − A_b − √((A_a − l_a)² + (u_b − A_b)² − 2ρ (A_a − l_a)(u_b − A_b)), high likewise with u_a and l_b. With limits
    A ± z√V of both it is the usual A_a − A_b ± z√(V_a + V_b − 2C). Where a variance is 0, ρ counts as 0, so that two models
    that both separate the sets exactly differ by 0 ± (1 − l). Models that rank every image alike differ by next to nothing.

    Args:
        members_a, members_b: scores of shape (m,), row i the same image. nonmembers_a, nonmembers_b: the same, (n,).

    Raises:
        ValueError: scores that are of another shape, empty or not finite, or not of the same number of images; confidence
            outside (0, 1).
    """
    a, b = _placements(members_a, nonmembers_a), _placements(members_b, nonmembers_b)
    sizes, others = (len(a[0]), len(a[1])), (len(b[0]), len(b[1]))
    if sizes != others:
        raise ValueError(f"scores of the same images are needed, got {sizes} and {others}")
    tail = _tail(confidence)
    auc_a, auc_b = float(a[0].mean()), float(b[0].mean())
    variance_a, variance_b = _covariance(a, a), _covariance(b, b)
    low_a, high_a = _bounds(auc_a, variance_a, *sizes, tail)
    low_b, high_b = _bounds(auc_b, variance_b, *sizes, tail)
    both = np.sqrt(variance_a * variance_b)
    rho = float(np.clip(_covariance(a, b) / both, -1, 1)) if both > 0 else 0.0
    difference = auc_a - auc_b
    low = difference - _joined(auc_a - low_a, high_b - auc_b, rho)
    high = difference + _joined(high_a - auc_a, auc_b - low_b, rho)
    return difference, max(-1.0, low), min(1.0, high)


def _placements(members: npt.ArrayLike, nonmembers: npt.ArrayLike) -> Placements:
    """Each member's share of nonmembers below it, (m,), and each nonmember's share of members above it, (n,); ties half."""
    x, y = finite_array(members, "members"), finite_array(nonmembers, "nonmembers")
    m, n = len(x), len(y)
    among_all = ranks(np.concatenate([x, y]))
    # A score's rank among all, less its rank among its own, is the number of the others below it.
    return (among_all[:m] - ranks(x)) / n, 1 - (among_all[m:] - ranks(y)) / m


def _covariance(a: Placements, b: Placements) -> float:
    """DeLong's covariance of two AUCs, S₁₀/m + S₀₁/n; 0 where a set has one image and it can't be estimated."""
    total = 0.0
    for one, other in zip(a, b, strict=True):
        if len(one) < 2:
            return 0.0
        total += float((one - one.mean()) @ (other - other.mean())) / (len(one) - 1) / len(one)
    return total


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return (1 - confidence) / 2


def _bounds(auc: float, variance: float, m: int, n: int, tail: float) -> tuple[float, float]:
    trials = fewest = min(m, n)
    if variance > 0:
        shrink = (normal_quantile(tail) / student_quantile(tail, fewest - 1)) ** 2
        trials = float(np.clip(shrink * auc * (1 - auc) / variance, fewest, max(fewest, 3 * m * n / (m + n + 1))))
    hits, misses = trials * auc, trials * (1 - auc)
    low = beta_quantile(tail, hits, misses + 1) if hits > 0 else 0.0
    high = beta_quantile(1 - tail, hits + 1, misses) if misses > 0 else 1.0
    return low, high


def _joined(one: float, other: float, rho: float) -> float:
    return float(np.sqrt(max(0.0, one**2 + other**2 - 2 * rho * one * other)))
