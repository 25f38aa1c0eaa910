"""Arrays → numbers. One small function per metric; the docstring has the formula and where it comes from.

Similarities are cosines of L2-normalised embeddings, larger is closer. Distances are Euclidean, smaller is closer;
between unit vectors d = √(2 − 2s), :func:`distance_of`.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def _values(array, name: str, dimensions: int = 1) -> np.ndarray:
    values = np.asarray(array, dtype=np.float64)
    if values.ndim != dimensions or values.size == 0:
        raise ValueError(f"{name}: a non-empty array of {dimensions} dimension(s) is needed, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: every value must be finite")
    return values


def distance_of(similarities) -> np.ndarray:
    """Euclidean distance between unit vectors from their cosine: d = √(2 − 2s), with s clipped to [−1, 1]."""
    return np.sqrt(2 - 2 * np.clip(np.asarray(similarities, dtype=np.float64), -1, 1))


def nn_quantiles(similarities, quantiles=QUANTILES) -> dict[str, float]:
    """Quantiles of nearest-neighbour similarities of shape (n,), linearly interpolated, keyed ``"0.5"`` and so on."""
    values = _values(similarities, "similarities")
    return {f"{q:g}": float(v) for q, v in zip(quantiles, np.quantile(values, quantiles), strict=True)}


def share_above(similarities, threshold: float) -> float:
    """Share of n similarities that are strictly greater than ``threshold``, in [0, 1].

    Strictly, because the threshold is itself one of the null similarities (:func:`eval.calibrate.threshold`).
    """
    return float(np.mean(_values(similarities, "similarities") > threshold))


def l2_ratio(distances, alpha: float = 0.5) -> np.ndarray:
    """d₁ / (α · mean(d₁ … d_k)) per image: how much closer the nearest training image is than the near ones are.

    Carlini et al. 2023, *Extracting Training Data from Diffusion Models* (arXiv 2301.13188), §5.1 "adaptive threshold":
    ℓ₂(x̂, x) / (α · E_{y ∈ S}[ℓ₂(x̂, y)]) with S the k = 50 nearest training images and α = .5. Small means copied; far
    from every training image it tends to 1/α = 2.

    Args:
        distances: array of shape (n, k), each row the distances to the k nearest training images (all, if fewer).

    Returns:
        array of shape (n,). A row of zeros, an image equal to all k neighbours, gives 0.
    """
    values = np.sort(_values(distances, "distances", 2), axis=1)
    scale = alpha * values.mean(axis=1)
    return np.divide(values[:, 0], scale, out=np.zeros(len(values)), where=scale > 0)


def d1_over_d2(distances) -> np.ndarray:
    """d₁ / d₂ per image; below 1/3 an image counts as memorised.

    Yoon et al. 2023, *Diffusion Probabilistic Models Generalize when They Fail to Memorize*, §3.

    Args:
        distances: array of shape (n, k ≥ 2), distances to the nearest training images.

    Returns:
        array of shape (n,). 0/0, two training images equal to the generated one, gives 0.
    """
    values = _values(distances, "distances", 2)
    if values.shape[1] < 2:
        raise ValueError("distances: two neighbours are needed for d1/d2")
    nearest = np.sort(values, axis=1)[:, :2]
    return np.divide(nearest[:, 0], nearest[:, 1], out=np.zeros(len(values)), where=nearest[:, 1] > 0)


def excess(to_train, to_heldout, threshold: float) -> float:
    """Rate of generated images above ``threshold`` against T, minus the same against H′ with |H′| = |T|.

    Zero in expectation for a model that knows the source but not the images: T and H′ are then exchangeable. Equal
    sizes are the caller's duty, since a larger set has closer neighbours.
    """
    return share_above(to_train, threshold) - share_above(to_heldout, threshold)


def frechet_distance(features_a, features_b) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), the squared 2-Wasserstein distance of two fitted Gaussians.

    Dowson & Landau 1982; as an image-quality measure Heusel et al. 2017 (arXiv 1706.08500), eq. 6. In float64, from the
    centred features A, B themselves: tr (Σ_a Σ_b)^½ is the nuclear norm of A Bᵀ / √((n_a − 1)(n_b − 1)), which needs
    no matrix square root and stays exact when n is smaller than the dimension.

    It is biased upwards by about 1/n: compare only figures of equal n, beside the figure of two real sets of that size.

    Args:
        features_a, features_b: arrays of shape (n_a, d) and (n_b, d), not normalised, n ≥ 2.
    """
    a, b = _values(features_a, "features_a", 2), _values(features_b, "features_b", 2)
    if len(a) < 2 or len(b) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"two sets of at least 2 features of one width are needed, got {a.shape} and {b.shape}")
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    mixed = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(max(means + np.sum(root_a**2) + np.sum(root_b**2) - 2 * mixed, 0.0))


def _covariance_root(features: np.ndarray) -> np.ndarray:
    """R with RᵀR = Σ, of shape (min(n, d), d)."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred


def mann_whitney_z(x, y) -> float:
    """Standardised Mann–Whitney U of x against y with the tie correction: positive when x tends to be larger.

    U = Σ_ij [x_i > y_j] + ½[x_i = y_j], mean mn/2, variance mn/12 · ((N + 1) − Σ(t³ − t)/(N(N − 1))), t the sizes of tied
    groups (Mann & Whitney 1947, *Annals of Mathematical Statistics* 18). Two constant, equal samples give 0.
    """
    x, y = _values(x, "x"), _values(y, "y")
    m, n = len(x), len(y)
    ranks = stats.rankdata(np.concatenate([x, y]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    ties = np.unique(ranks, return_counts=True)[1].astype(np.float64)
    total = m + n
    variance = m * n / 12 * ((total + 1) - np.sum(ties**3 - ties) / (total * (total - 1)))
    return float((u - m * n / 2) / np.sqrt(variance)) if variance > 0 else 0.0
