"""Arrays → numbers. One small function per metric; the docstring has the formula and where it comes from.

Similarities are cosines of L2-normalised embeddings, larger is closer. Distances are Euclidean, smaller is closer;
between unit vectors d = √(2 − 2s), :func:`distance_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from eval.quality import clip_score, finite_array, frechet_distance, kid, nearest_distances, prdc, vendi_score
from eval.statistics.scipy_functions import Floats, k_means_centres, mann_whitney_u, ranks

# The figures of quality are metrics too, and are called by this module's name.
__all__ = [
    "LEGACY_THRESHOLDS", "QUANTILES", "authpct", "authpct_of_distances", "c_t", "clip_score", "d1_over_d2", "denoising_gap",
    "distance_of", "excess", "frechet_distance", "kid", "l2_ratio", "legacy_shares", "mann_whitney_z", "nn_quantiles",
    "prdc", "roc_auc", "score_normalization", "share_above", "tpr_at_fpr", "vendi_score",
]  # fmt: skip

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# What earlier work calls a copy: DINO's from Daras et al. 2024 (arXiv 2404.10177), SSCD's .5 from Somepalli et al. 2023
# (arXiv 2212.03860) and .75 (precision .9 on DISC2021) from Pizzi et al. 2022 (arXiv 2202.10261). Uncalibrated: see
# :func:`eval.statistics.calibrate.threshold`.
LEGACY_THRESHOLDS = {"dinov2": (0.9, 0.95), "dinov2_paper": (0.9, 0.95), "sscd": (0.5, 0.75)}
# A false-positive rate times a number of images is often meant to be whole (.29 · 100) and comes out just below it.
_ROUNDING = 1e-9


def distance_of(similarities: npt.ArrayLike) -> Floats:
    """Euclidean distance between unit vectors from their cosine: d = √(2 − 2s), with s clipped to [−1, 1]."""
    return np.sqrt(2 - 2 * np.clip(np.asarray(similarities, dtype=np.float64), -1, 1))


def nn_quantiles(similarities: npt.ArrayLike, quantiles: Sequence[float] = QUANTILES) -> dict[str, float]:
    """Quantiles of nearest-neighbour similarities of shape (n,), linearly interpolated, keyed ``"0.5"`` and so on."""
    values = finite_array(similarities, "similarities")
    return {f"{q:g}": float(v) for q, v in zip(quantiles, np.quantile(values, quantiles), strict=True)}


def share_above(similarities: npt.ArrayLike, threshold: float) -> float:
    """Share of n similarities that are strictly greater than ``threshold``, in [0, 1].

    Strictly, because the threshold is itself one of the null similarities (:func:`eval.statistics.calibrate.threshold`).
    """
    return float(np.mean(finite_array(similarities, "similarities") > threshold))


def legacy_shares(similarities: npt.ArrayLike, thresholds: Iterable[float]) -> dict[str, float]:
    """Share of n nearest-neighbour similarities strictly above each threshold, keyed ``"0.9"`` and so on.

    For comparison with published figures, at ``LEGACY_THRESHOLDS[embedder]``.

    Raises:
        ValueError: similarities that are not (n,), empty or not finite.
    """
    return {f"{threshold:g}": share_above(similarities, threshold) for threshold in thresholds}


def score_normalization(similarities: npt.ArrayLike, to_background: npt.ArrayLike, k: int = 2) -> Floats:
    """s(q, r) − mean of the k largest s(q, b) over background images b: how far a match stands out for this query.

    Pizzi et al. 2022, *A Self-Supervised Descriptor for Image Copy Detection* (arXiv 2202.10261), eq. 8 with β = 1.

    Args:
        similarities: array of shape (n,), each query's similarity to its match.
        to_background: array of shape (n, ≥ k), the query's similarities to the background set, or only its largest
            (as :func:`eval.neighbours.nearest` gives them).

    Returns:
        array of shape (n,).

    Raises:
        ValueError: shapes that don't fit, empty arrays, values that aren't finite, or k < 1.
    """
    values, background = finite_array(similarities, "similarities"), finite_array(to_background, "to_background", 2)
    if not 1 <= k <= background.shape[1] or len(background) != len(values):
        raise ValueError(f"to_background: shape ({len(values)}, at least k = {k} ≥ 1) is needed, got {background.shape}")
    return values - np.sort(background, axis=1)[:, -k:].mean(axis=1)


def l2_ratio(distances: npt.ArrayLike, alpha: float = 0.5) -> Floats:
    """d₁ / (α · mean(d₁ … d_k)) per image: how much closer the nearest training image is than the near ones are.

    Carlini et al. 2023, *Extracting Training Data from Diffusion Models* (arXiv 2301.13188), §5.1 "adaptive threshold":
    ℓ₂(x̂, x) / (α · E_{y ∈ S}[ℓ₂(x̂, y)]) with S the k = 50 nearest training images and α = .5. Small means copied; far
    from every training image it tends to 1/α = 2.

    Args:
        distances: array of shape (n, k), each row the distances to the k nearest training images (all, if fewer).

    Returns:
        array of shape (n,). A row of zeros, an image equal to all k neighbours, gives 0.
    """
    values = np.sort(finite_array(distances, "distances", 2), axis=1)
    scale = alpha * values.mean(axis=1)
    return np.divide(values[:, 0], scale, out=np.zeros(len(values)), where=scale > 0)


def d1_over_d2(distances: npt.ArrayLike) -> Floats:
    """d₁ / d₂ per image; below 1/3 an image counts as memorised.

    Yoon et al. 2023, *Diffusion Probabilistic Models Generalize when They Fail to Memorize*, §3.

    Args:
        distances: array of shape (n, k ≥ 2), distances to the nearest training images.

    Returns:
        array of shape (n,). 0/0, two training images equal to the generated one, gives 0.
    """
    values = finite_array(distances, "distances", 2)
    if values.shape[1] < 2:
        raise ValueError("distances: two neighbours are needed for d1/d2")
    nearest = np.sort(values, axis=1)[:, :2]
    return np.divide(nearest[:, 0], nearest[:, 1], out=np.zeros(len(values)), where=nearest[:, 1] > 0)


def excess(to_train: npt.ArrayLike, to_heldout: npt.ArrayLike, threshold: float) -> float:
    """Rate of generated images above ``threshold`` against T, minus the same against H′ with |H′| = |T|.

    Zero in expectation for a model that knows the source but not the images: T and H′ are then exchangeable. Equal
    sizes are the caller's duty, since a larger set has closer neighbours.
    """
    return share_above(to_train, threshold) - share_above(to_heldout, threshold)


def authpct(generated: npt.ArrayLike, train: npt.ArrayLike) -> float:
    """Share of generated x̂ with d(x̂, t*) > d(t*, nearest other training image), t* the training image nearest to x̂.

    Authenticity of Alaa et al. 2022, *How Faithful is your Synthetic Data?* (arXiv 2102.08921), called AuthPct by Stein
    et al. 2023 (arXiv 2306.04675), who multiply by 100. Low means copied. A t* with a duplicate in the training set
    makes all but its exact copies authentic: deduplicate first.

    Args:
        generated, train: arrays of shape (n, d) and (m ≥ 2, d), compared by Euclidean distance.

    Raises:
        ValueError: shapes that don't fit, empty arrays, or values that aren't finite.
    """
    queries, references = finite_array(generated, "generated", 2), finite_array(train, "train", 2)
    if len(references) < 2:
        raise ValueError("train: at least 2 training images are needed")
    distances, nearest = nearest_distances(queries, references)
    wanted, which = np.unique(nearest[:, 0], return_inverse=True)
    # Of the two training images nearest to t*, one is t* itself or, just as far, a duplicate.
    nearest_other = nearest_distances(references[wanted], references, 2)[0].max(axis=1)
    return authpct_of_distances(distances[:, 0], nearest_other[which])


def authpct_of_distances(to_nearest: npt.ArrayLike, nearest_to_other: npt.ArrayLike) -> float:
    """:func:`authpct` from d(x̂, t*) and d(t*, nearest other training image), arrays of shape (n,)."""
    return float(np.mean(finite_array(to_nearest, "to_nearest") > finite_array(nearest_to_other, "nearest_to_other")))


def c_t(
    generated: npt.ArrayLike,
    heldout: npt.ArrayLike,
    train: npt.ArrayLike,
    *,
    cells: int = 10,
    min_generated: int = 20,
    seed: int = 0,
    to_train: Sequence[Floats] | None = None,
) -> float:
    """C_T = Σ_π P(π) Z_π / Σ_π P(π): are generated images nearer to the training set than held-out ones? Negative: copied.

    The space is cut into cells π by k-means on the training set. Z_π is :func:`mann_whitney_z` of the distances to the
    nearest training image, generated against held-out images of the cell, about N(0, 1) where nothing is copied; P(π) is
    the share of held-out images in the cell. Sums run over the cells with at least ``min_generated`` generated images
    and a held-out one (Meehan, Chaudhuri & Dasgupta 2020, *A Non-Parametric Test to Detect Data-Copying in Generative
    Models*, arXiv 2004.05675, §3.2; τ = 20/m as in their experiments).

    Args:
        generated, heldout, train: arrays of shape (m, d), (n, d) and (l, d), l ≥ cells, compared by Euclidean distance.
        cells: cells of the partition; 1 is the paper's global test, Z_U.
        seed: of k-means.
        to_train: the generated and the held-out images' distances to their nearest training images, (m,) and (n,), where
            they are known; ``train`` then only makes the cells, and a part of it will do.

    Raises:
        ValueError: shapes that don't fit, empty arrays, values that aren't finite, more cells than distinct training images,
            or no cell with enough images.
    """
    x, y = finite_array(generated, "generated", 2), finite_array(heldout, "heldout", 2)
    references = finite_array(train, "train", 2)
    distinct = len(np.unique(references, axis=0))
    if not 1 <= cells <= distinct:
        raise ValueError(f"cells: between 1 and the {distinct} distinct training images are needed, got {cells}")
    if to_train is None:
        to_train = [nearest_distances(images, references)[0][:, 0] for images in (x, y)]
    centres = k_means_centres(references, cells, seed)
    in_cell = [nearest_distances(images, centres)[1][:, 0] for images in (x, y)]
    counts = [np.bincount(cell, minlength=cells) for cell in in_cell]
    kept = np.flatnonzero((counts[0] >= max(1, min_generated)) & (counts[1] > 0))
    if not kept.size:
        raise ValueError(f"no cell has {min_generated} generated images and a held-out one: fewer cells or more images")
    z = [mann_whitney_z(*(d[cell == i] for d, cell in zip(to_train, in_cell, strict=True))) for i in kept]
    return float(np.average(z, weights=counts[1][kept]))


def denoising_gap(train_errors: npt.ArrayLike, heldout_errors: npt.ArrayLike) -> tuple[Floats, Floats]:
    """MSE(t) on training images minus MSE(t) on held-out ones, and its standard error √(s²/n + s′²/n′) per t.

    Negative: training images are denoised better than new ones, the signal of the loss-threshold membership attack (Yeom
    et al. 2018, arXiv 1709.01604; on diffusion models Matsumoto et al. 2023, arXiv 2302.03262). Standard error of a
    difference of means with unequal variances: Welch 1938, *Biometrika* 29.

    Args:
        train_errors, heldout_errors: arrays of shape (n ≥ 2, steps) and (n′ ≥ 2, steps), one row per image, one column
            per t.

    Returns:
        gap and standard error, arrays of shape (steps,).

    Raises:
        ValueError: shapes that don't fit, empty arrays, fewer than 2 images, or values that aren't finite.
    """
    a, b = finite_array(train_errors, "train_errors", 2), finite_array(heldout_errors, "heldout_errors", 2)
    if len(a) < 2 or len(b) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"errors of at least 2 images each at the same steps are needed, got {a.shape} and {b.shape}")
    return a.mean(0) - b.mean(0), np.sqrt(a.var(0, ddof=1) / len(a) + b.var(0, ddof=1) / len(b))


def roc_auc(members: npt.ArrayLike, nonmembers: npt.ArrayLike) -> float:
    """P(member > nonmember) + ½ P(member = nonmember), the area under the ROC curve; larger scores mean member.

    U/(mn) of Mann & Whitney, whose ties are the curve's slanted parts (Bamber 1975, *J. Math. Psychology* 12).

    Args:
        members, nonmembers: scores of shape (m,) and (n,).

    Raises:
        ValueError: scores that are of another shape, empty or not finite.
    """
    x, y = finite_array(members, "members"), finite_array(nonmembers, "nonmembers")
    return mann_whitney_u(x, y) / (len(x) * len(y))


def tpr_at_fpr(members: npt.ArrayLike, nonmembers: npt.ArrayLike, fpr: float = 0.01) -> float:
    """Largest share of members above a threshold that at most a share ``fpr`` of nonmembers exceeds.

    The threshold is the (⌊fpr · n⌋ + 1)-th largest nonmember; only scores strictly above it count, so equal scores fall
    on one side and nothing is interpolated. With n < 1/fpr no nonmember may exceed it. Carlini et al. 2022, *Membership
    Inference Attacks From First Principles* (arXiv 2112.03570), whose figure of merit this is.

    Args:
        members, nonmembers: scores of shape (m,) and (n,), larger means member.

    Raises:
        ValueError: scores that are of another shape, empty or not finite; fpr outside [0, 1).
    """
    x, y = finite_array(members, "members"), finite_array(nonmembers, "nonmembers")
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must lie in [0, 1), got {fpr}")
    # fpr · n may reach n only by rounding.
    allowed = min(int(fpr * len(y) + _ROUNDING), len(y) - 1)
    return share_above(x, np.sort(y)[len(y) - 1 - allowed])


def mann_whitney_z(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Standardised Mann–Whitney U of x against y with the tie correction: positive when x tends to be larger.

    U = Σ_ij [x_i > y_j] + ½[x_i = y_j], mean mn/2, variance mn/12 · ((N + 1) − Σ(t³ − t)/(N(N − 1))), t the sizes of tied
    groups (Mann & Whitney 1947, *Annals of Mathematical Statistics* 18). Two constant, equal samples give 0.
    """
    a, b = finite_array(x, "x"), finite_array(y, "y")
    m, n = len(a), len(b)
    among_all = ranks(np.concatenate([a, b]))
    u = among_all[:m].sum() - m * (m + 1) / 2
    ties = np.unique(among_all, return_counts=True)[1].astype(np.float64)
    total = m + n
    variance = m * n / 12 * ((total + 1) - np.sum(ties**3 - ties) / (total * (total - 1)))
    return float((u - m * n / 2) / np.sqrt(variance)) if variance > 0 else 0.0
