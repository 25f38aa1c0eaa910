"""Generated images' nearest real ones → the figures of similarity and distance to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.neighbours import Search, nearest, search
from eval.quality import QUALITY_MOST
from eval.reporting.references import BACKGROUND, References
from eval.schema import CTFigures, D1OverD2Figures, L2RatioFigures, ScoreNormalized, SearchFigures, Similarities

NEIGHBOURS = 50  # k of the ℓ2 ratio, Carlini et al. 2023


@dataclass(frozen=True)
class Neighbours:
    """The nearest real images of n generated ones.

    Attributes:
        search: similarities to the nearest training images as they are, (n, ≤ NEIGHBOURS), and their indices.
        to_train, indices: similarity (n,) to the nearest training image, seen in any way, and its index (n,).
        to_heldout: similarities to the nearest held-out images, (n, ≤ BACKGROUND); None without those.
        distances: to the nearest training images, Euclidean, of the shape of ``search.similarities``.
        l2_ratios: (n,).
        normalized: (n,) similarities to the training set less the mean of those to the nearest held-out images; None
            without enough of those.
    """

    search: Search[np.ndarray]
    to_train: np.ndarray
    indices: np.ndarray
    to_heldout: np.ndarray | None
    distances: np.ndarray
    l2_ratios: np.ndarray
    normalized: np.ndarray | None

    @classmethod
    def of(cls, generated: Embedded, references: References) -> Neighbours:
        """Search in both sets."""
        in_train, heldout = search(generated.embeddings, references.train.embeddings, NEIGHBOURS), references.heldout
        to_heldout = nearest(generated.embeddings, heldout.embeddings, BACKGROUND)[0] if heldout else None
        distances, normalized = metrics.distance_of(in_train.similarities), None
        if to_heldout is not None and to_heldout.shape[1] >= BACKGROUND:
            normalized = metrics.score_normalization(in_train.similarities[:, 0], to_heldout, BACKGROUND)
        plain = in_train.similarities[:, 0], in_train.indices[:, 0]
        nearest_ones = references.with_views(generated.embeddings, *plain)
        return cls(in_train, *nearest_ones, to_heldout, distances, metrics.l2_ratio(distances), normalized)

    @property
    def to_nearest_heldout(self) -> np.ndarray | None:
        """Similarity to the nearest held-out image, (n,)."""
        return None if self.to_heldout is None else self.to_heldout[:, 0]


def similarity_figures(values: np.ndarray) -> Similarities:
    """Mean and quantiles of similarities (n,)."""
    return {"mean": float(np.mean(values)), "quantiles": metrics.nn_quantiles(values)}


def search_figures(neighbours: Neighbours) -> SearchFigures:
    """How the training set was searched."""
    result = neighbours.search
    return {"method": result.method, "recall": result.recall, "recall_measured_on": result.sampled}


def l2_ratio_figures(neighbours: Neighbours) -> L2RatioFigures:
    """Carlini et al.'s adaptive distance."""
    k = neighbours.distances.shape[1]
    return {"k": k, "alpha": 0.5, "quantiles": metrics.nn_quantiles(neighbours.l2_ratios)}


def d1_over_d2_figures(neighbours: Neighbours) -> D1OverD2Figures | None:
    """Yoon et al.'s ratio; None with one training image."""
    if neighbours.distances.shape[1] < 2:
        return None
    values = metrics.d1_over_d2(neighbours.distances)
    return {"quantiles": metrics.nn_quantiles(values), "share_below_third": float(np.mean(values < 1 / 3))}


def normalized_figures(neighbours: Neighbours, references: References) -> ScoreNormalized | None:
    """The score-normalised similarities and their share above a threshold of their own."""
    values, level = neighbours.normalized, references.normalized_threshold
    if values is None:
        return None
    return {
        "k": BACKGROUND,
        "quantiles": metrics.nn_quantiles(values),
        "threshold": level,
        "share_above_threshold": None if level is None else metrics.share_above(values, level),
    }


def authpct(neighbours: Neighbours, train: Embedded) -> float | None:
    """AuthPct between normalised embeddings, from the neighbours that are known already; None with one training image."""
    if len(train) < 2:
        return None
    wanted, which = np.unique(neighbours.search.indices[:, 0], return_inverse=True)
    # Of the two training images nearest to t*, one is t* itself or, just as near, a duplicate.
    other = nearest(train.embeddings[wanted], train.embeddings, 2)[0].min(axis=1)
    plain = neighbours.search.similarities[:, 0]
    return metrics.authpct_of_distances(metrics.distance_of(plain), metrics.distance_of(other)[which])


def c_t_figures(generated: Embedded, neighbours: Neighbours, references: References) -> CTFigures | None:
    """C_T over as many cells as leave about 60 generated images to each; None below 20 images, where it is not defined."""
    if references.heldout is None or references.null is None:
        return None
    train = references.train.thinned(QUALITY_MOST).embeddings
    cells = max(1, min(10, len(generated) // 60, len(train) // 2))
    distances = [metrics.distance_of(values) for values in (neighbours.to_train, references.null)]
    try:
        value = metrics.c_t(generated.embeddings, references.heldout.embeddings, train, cells=cells, to_train=distances)
    except ValueError:
        return None
    return {"value": value, "cells": cells}
