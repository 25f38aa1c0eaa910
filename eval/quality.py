"""Embeddings → how good the pictures are: fidelity and variety, to stand beside every memorisation figure.

All functions take arrays of shape (n, d) in any embedding, raw unless the docstring says that they are normalised, and
compute in float64. Products of two sets are made a tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from eval.neighbours import nearest

Floats = npt.NDArray[np.float64]

# Relative rounding of a float64 squared distance that is put together from norms and a product.
_ROUNDING = 1e-12
# Images of a set that quality, cells and controls are measured on, and that a Fréchet distance is taken of; more are thinned
# evenly.
QUALITY_MOST, FRECHET_MOST = 5000, 50_000
# Rows of either set in one tile of a product: 32 MiB of float64.
_CHUNK = (1024, 4096)


def finite_array(array: npt.ArrayLike, name: str, dimensions: int = 1) -> Floats:
    """``array`` in float64; ValueError with ``name`` unless it is non-empty, finite and of so many dimensions."""
    values = np.asarray(array, dtype=np.float64)
    if values.ndim != dimensions or values.size == 0:
        raise ValueError(f"{name}: a non-empty array of {dimensions} dimension(s) is needed, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: every value must be finite")
    return values


def nearest_distances(
    queries: Floats, references: Floats, k: int = 1, *, leave_one_out: bool = False
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Euclidean distances of each query to its k nearest references, nearest first, and their indices: both (n, k).

    The nearest are those of largest ⟨(q, 1), (r, −‖r‖²/2)⟩ = (‖q‖² − ‖q − r‖²)/2; distances come from the differences,
    so that an equal image is at 0. Arguments and errors are :func:`eval.neighbours.nearest`'s.
    """
    lifted = np.column_stack([references, -0.5 * np.einsum("ij,ij->i", references, references)])
    _, indices = nearest(np.column_stack([queries, np.ones(len(queries))]), lifted, k, leave_one_out=leave_one_out)
    distances = np.empty(indices.shape)
    for start in range(0, len(queries), 1024):
        rows = slice(start, start + 1024)
        distances[rows] = np.linalg.norm(references[indices[rows]] - queries[rows, None], axis=2)
    return distances, indices


def frechet_distance(features_a: npt.ArrayLike, features_b: npt.ArrayLike) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), the squared 2-Wasserstein distance of two fitted Gaussians.

    Dowson & Landau 1982; as an image-quality measure Heusel et al. 2017 (arXiv 1706.08500), eq. 6. In float64, from the
    centred features A, B themselves: tr (Σ_a Σ_b)^½ is the nuclear norm of A Bᵀ / √((n_a − 1)(n_b − 1)), which needs
    no matrix square root and stays exact when n is smaller than the dimension.

    It is biased upwards by about 1/n: compare only figures of equal n, beside the figure of two real sets of that size.

    Args:
        features_a, features_b: arrays of shape (n_a, d) and (n_b, d), not normalised, n ≥ 2.

    Raises:
        ValueError: shapes that don't fit, fewer than 2 images, or values that aren't finite.
    """
    a, b = _two_sets(features_a, features_b)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    mixed = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(max(means + np.sum(root_a**2) + np.sum(root_b**2) - 2 * mixed, 0.0))


def _covariance_root(features: Floats) -> Floats:
    """R with RᵀR = Σ, of shape (min(n, d), d)."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred


def kid(features_a: npt.ArrayLike, features_b: npt.ArrayLike, *, chunk: tuple[int, int] = _CHUNK) -> float:
    """Kernel distance: unbiased MMD² with the kernel k(x, y) = (⟨x, y⟩/d + 1)³; around 0, also below, for equal laws.

    Σ_{i≠j} k(a_i, a_j)/(n(n − 1)) + Σ_{i≠j} k(b_i, b_j)/(m(m − 1)) − 2 Σ_ij k(a_i, b_j)/(nm). Bińkowski et al. 2018,
    *Demystifying MMD GANs* (arXiv 1801.01401), §4; the estimator is Gretton et al. 2012, *JMLR* 13, eq. 3. Computed from
    all images at once, not as a mean over random subsets.

    Args:
        features_a, features_b: arrays of shape (n, d) and (m, d), n, m ≥ 2.
        chunk: rows of either set in one tile.

    Raises:
        ValueError: shapes that don't fit, fewer than 2 images, or values that aren't finite.
    """
    a, b = _two_sets(features_a, features_b)

    def kernel(products: Floats) -> Floats:
        base = products / a.shape[1] + 1
        return base * base * base

    def total(x: Floats, y: Floats) -> float:
        return sum(kernel(x[rows] @ y[columns].T).sum() for rows, columns in _tiles(len(x), len(y), chunk))

    def within(x: Floats) -> float:
        return (total(x, x) - kernel(np.einsum("ij,ij->i", x, x)).sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def prdc(real: npt.ArrayLike, generated: npt.ArrayLike, k: int = 5, *, chunk: tuple[int, int] = _CHUNK) -> dict[str, float]:
    """Precision, recall, density and coverage from balls that reach each image's k-th neighbour in its own set.

    precision: share of generated images in some real ball; recall: share of real images in some generated ball
    (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1 and 2). density: mean number of real balls around a generated image,
    divided by k, so it can exceed 1; coverage: share of real balls with a generated image in them (Naeem et al. 2020,
    *Reliable Fidelity and Diversity Metrics*, arXiv 2002.09797, §3). Balls are closed, as in eq. 1.

    Args:
        real, generated: arrays of shape (n, d) and (m, d), n, m > k.
        chunk: rows of either set in one tile.

    Raises:
        ValueError: shapes that don't fit, k < 1, no more than k images, or values that aren't finite.
    """
    x, y = _two_sets(real, generated)
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(f"k = {k} neighbours need k ≥ 1 and more than k images, got {len(x)} and {len(y)}")
    around_generated, in_real = _in_balls(y, x, k, chunk)
    around_real, _ = _in_balls(x, y, k, chunk)
    return {
        "precision": float(np.mean(around_generated > 0)),
        "recall": float(np.mean(around_real > 0)),
        "density": float(np.mean(around_generated) / k),
        "coverage": float(np.mean(in_real > 0)),
    }


def vendi_score(features: npt.ArrayLike) -> float:
    """exp(−Σ λ log λ) over the eigenvalues λ of K/n, K_ij the cosine of images i and j: how many different images, 1 … n.

    Friedman & Dieng 2022, *The Vendi Score* (arXiv 2210.02410), Definition 3.1. With x the normalised features, xxᵀ/n and
    xᵀx/n have the same eigenvalues but for zeros; the smaller is used.

    Args:
        features: array of shape (n, d), normalised here.

    Raises:
        ValueError: an array of another shape, empty, not finite, or with a row of zeros.
    """
    x = _normalised(finite_array(features, "features", 2), "features")
    values = np.linalg.eigvalsh((x.T @ x if len(x) > x.shape[1] else x @ x.T) / len(x))
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))


def clip_score(image_embeddings: npt.ArrayLike, text_embeddings: npt.ArrayLike) -> Floats:
    """100 · max(cos(image, its text), 0) per pair, in CLIP's embedding: (n,).

    Hessel et al. 2021, *CLIPScore* (arXiv 2104.08718), §3, with torchmetrics' weight of 100 for the paper's 2.5. The
    maximum is taken per pair, as in the paper; torchmetrics takes it of the mean.

    Args:
        image_embeddings, text_embeddings: arrays of shape (n, d), row i of one belonging to row i of the other, normalised
            here.

    Raises:
        ValueError: unequal shapes, empty arrays, values that aren't finite, or a row of zeros.
    """
    images = finite_array(image_embeddings, "image_embeddings", 2)
    texts = finite_array(text_embeddings, "text_embeddings", 2)
    if images.shape != texts.shape:
        raise ValueError(f"one text for each image is needed, got shapes {images.shape} and {texts.shape}")
    cosines = np.sum(_normalised(images, "image_embeddings") * _normalised(texts, "text_embeddings"), axis=1)
    return 100 * np.clip(cosines, 0, 1)


def _two_sets(features_a: npt.ArrayLike, features_b: npt.ArrayLike) -> tuple[Floats, Floats]:
    a, b = finite_array(features_a, "features_a", 2), finite_array(features_b, "features_b", 2)
    if len(a) < 2 or len(b) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"two sets of at least 2 features of one width are needed, got {a.shape} and {b.shape}")
    return a, b


def _normalised(features: Floats, name: str) -> Floats:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"{name}: a row of zeros has no direction")
    return features / norms


def _tiles(rows: int, columns: int, chunk: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Slices that cut a matrix of so many rows and columns into tiles of at most ``chunk``."""
    for i in range(0, rows, chunk[0]):
        for j in range(0, columns, chunk[1]):
            yield slice(i, i + chunk[0]), slice(j, j + chunk[1])


def _in_balls(
    points: Floats, centres: Floats, k: int, chunk: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Balls around each point, (n,), and points in each ball, (m,), of the balls from a centre to its k-th neighbour."""
    squared_radii = nearest_distances(centres, centres, k, leave_one_out=True)[0][:, -1] ** 2
    points_squared, centres_squared = (np.einsum("ij,ij->i", x, x) for x in (points, centres))
    around, inside = np.zeros(len(points), dtype=np.int64), np.zeros(len(centres), dtype=np.int64)
    for rows, columns in _tiles(len(points), len(centres), chunk):
        norms = points_squared[rows, None] + centres_squared[None, columns]
        # On the boundary, and for equal images, rounding must not decide.
        within = norms * (1 - _ROUNDING) - 2 * points[rows] @ centres[columns].T <= squared_radii[columns]
        around[rows] += within.sum(1)
        inside[columns] += within.sum(0)
    return around, inside
