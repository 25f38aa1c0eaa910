"""Embeddings → the figures of report.json: per sampler, and the controls they are read against."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.neighbours import nearest, search
from eval.statistics.calibrate import (
    InsufficientData,
    benjamini_hochberg,
    clopper_pearson,
    cluster_bootstrap,
    conformal_p_values,
    copied_share,
    effective_count,
    smallest_null,
    threshold,
)

NEIGHBOURS = 50  # k of the ℓ2 ratio, Carlini et al. 2023
BACKGROUND = 2  # k of the score normalisation
QUALITY_MOST = 5000  # images of a set that quality and cells are measured on; more are thinned evenly
FRECHET_MOST = 50_000
COPIED_MOST = 24  # training images that a report names as copied most


@dataclass
class References:
    """The sets that generated images are compared with, and the threshold that the null gives.

    Attributes:
        train, heldout: in the report's embedder; train_pooled and heldout_pooled: pooled pixels. No held-out set: None.
        null: similarities to the nearest training image, shape (n,), of images that were not trained on: the held-out ones,
            or without them the base model's (``null_from`` is "heldout" or "base"); None without either.
        threshold: τ_α, or None with ``refusal`` saying why.
        embedder: its name.
        planted: similarities of known copies by what was done to them; ``recall_control`` names those whose recall the
            copied share is corrected by.
        normalized_threshold: τ_α of the score-normalised similarities, where they exist.
    """

    train: Embedded
    heldout: Embedded | None
    train_pooled: Embedded
    heldout_pooled: Embedded | None
    alpha: float
    confidence: float
    null: np.ndarray | None
    null_from: str | None
    threshold: float | None
    refusal: str | None
    embedder: str = "pixel"
    planted: dict[str, np.ndarray] = field(default_factory=dict)
    normalized_threshold: float | None = None

    @property
    def recall_control(self) -> str | None:
        """The control that is most like what a generated copy went through: the model's VAE, else JPEG."""
        return next((name for name in ("vae", "jpeg") if name in self.planted), None)


def make_references(
    train: Embedded,
    heldout: Embedded | None,
    train_pooled: Embedded,
    heldout_pooled: Embedded | None,
    alpha: float,
    confidence: float,
    embedder: str,
    planted: dict[str, np.ndarray],
    base: Embedded | None = None,
) -> References:
    """Calibrate on the held-out images, or without them on the base model's (``base``), or note why that is refused."""
    null_from, images = ("heldout", heldout) if heldout else ("base", base) if base else (None, None)
    null = nearest(images.embeddings, train.embeddings, 1)[0][:, 0] if images else None
    value, refusal = None, "neither held-out images nor the base model's are there to compare with"
    if null is not None:
        value, refusal = _calibrated(null, alpha)
        if refusal and null_from == "base":
            refusal = refusal.replace("held-out images", "images of the base model")
    sets = (train, heldout, train_pooled, heldout_pooled)
    made = References(*sets, alpha, confidence, null, null_from, value, refusal, embedder, planted)
    if heldout and len(heldout) > BACKGROUND:
        background = nearest(heldout.embeddings, heldout.embeddings, BACKGROUND, leave_one_out=True)[0]
        made.normalized_threshold, _ = _calibrated(metrics.score_normalization(null, background, BACKGROUND), alpha)
    return made


def _calibrated(null: np.ndarray, alpha: float) -> tuple[float | None, str | None]:
    try:
        return threshold(null, alpha), None
    except InsufficientData as error:
        return None, str(error)


def _similarities(values: np.ndarray) -> dict:
    return {"mean": float(np.mean(values)), "quantiles": metrics.nn_quantiles(values)}


def prompts_of(images: Embedded) -> np.ndarray:
    """What images have in common: their prompt. Without prompts every image stands for itself."""
    prompts = [record.caption or "" for record in images.images.records]
    return np.array(prompts) if any(prompts) else np.arange(len(prompts))


def _share(values: np.ndarray, references: References, clusters: np.ndarray | None = None) -> dict:
    """Share above τ with its interval; None where nothing is calibrated. Images of one prompt count for as many as they
    are worth."""
    if references.threshold is None:
        return {
            "share_above_threshold": None,
            "count_above_threshold": None,
            "effective_images": None,
            "interval": None,
        }
    flags = values > references.threshold
    count = effective_count(flags, clusters) if clusters is not None else float(len(flags))
    return {
        "share_above_threshold": float(flags.mean()),
        "count_above_threshold": int(flags.sum()),
        "effective_images": count,
        "interval": list(clopper_pearson(float(flags.mean()) * count, count, references.confidence)),
    }


def copied(share: float | None, count: float | None, references: References, confidence: float) -> dict | None:
    """The share of images that are copies, from the share above τ of ``count`` effective images: value, low, high.

    None where nothing is calibrated or no copy was planted.
    """
    name = references.recall_control
    if share is None or name is None:
        return None
    recalled = references.planted[name] > references.threshold
    counts = (share * count, count, int(recalled.sum()), len(recalled), len(references.null))
    found = copied_share(*counts, references.alpha, confidence)
    return {**asdict(found), "recall_control": name}


def _p_values(values: np.ndarray, references: References) -> np.ndarray | None:
    return None if references.threshold is None else conformal_p_values(values, references.null)


def _discoveries(p: np.ndarray | None, references: References) -> dict | None:
    """Images that are too near to be chance, at a false discovery rate of α among those named."""
    if p is None:
        return None
    return {
        "rate": references.alpha,
        "count": int(benjamini_hochberg(p, references.alpha).sum()),
        "smallest_p": float(p.min()),
    }


# -- controls --------------------------------------------------------------------


def control_figures(references: References) -> dict:
    """What the real images do among themselves: held-out → training (the null), training → training, and their FD."""
    null = references.null if references.null_from == "heldout" else None
    heldout = None if null is None else {**_control(null, references), "similarities": _rounded(np.sort(null))}
    own = _own_neighbours(references.train)
    return {
        "heldout_to_train": heldout,
        "train_to_train": None if own is None else _control(own, references),
        "planted": {name: _control(values, references) for name, values in references.planted.items()},
        "fd_pixels": _frechet(references.train_pooled, references.heldout_pooled),
        "fd_embedding": _frechet(references.train, references.heldout),
    }


def _control(values: np.ndarray, references: References) -> dict:
    return {"n": len(values), "similarity_to_train": _similarities(values), **_share(values, references)}


def _own_neighbours(train: Embedded) -> np.ndarray | None:
    """Training images' similarities to the nearest other one; of a large set, of some."""
    if len(train) < 2:
        return None
    if len(train) <= QUALITY_MOST:
        return nearest(train.embeddings, train.embeddings, 1, leave_one_out=True)[0][:, 0]
    # An image is its own nearest, so the second is the nearest other one.
    return nearest(train.thinned(QUALITY_MOST).embeddings, train.embeddings, 2)[0][:, 1]


def threshold_figures(references: References) -> dict:
    return {
        "value": references.threshold,
        "null": references.null_from,
        "normalized_value": references.normalized_threshold,
        "alpha": references.alpha,
        "confidence": references.confidence,
        "n_heldout": len(references.heldout) if references.heldout else 0,
        "n_null": 0 if references.null is None else len(references.null),
        "n_heldout_needed": smallest_null(references.alpha),
        "refusal": references.refusal,
    }


# -- one folder of generated images ------------------------------------------------


def sampler_figures(
    generated: Embedded, pooled: Embedded, references: References, runs: list[int] | None = None, clip: dict | None = None
) -> dict:
    """Everything measured on one folder of generated images; the schema is in docs/EVALUATION.md.

    Args:
        runs: for each image the seed it was asked for with.
        clip: the CLIP score's figures.
    """
    train, heldout, clusters = references.train, references.heldout, prompts_of(generated)
    found = search(generated.embeddings, train.embeddings, NEIGHBOURS)
    to_train, neighbours = found.similarities, found.indices
    to_heldout = nearest(generated.embeddings, heldout.embeddings, BACKGROUND)[0] if heldout else None
    ratios, p = metrics.l2_ratio(metrics.distance_of(to_train)), _p_values(to_train[:, 0], references)
    normalized = _normalized(to_train[:, 0], to_heldout)
    share = _share(to_train[:, 0], references, clusters)
    legacy = metrics.LEGACY_THRESHOLDS.get(references.embedder, (0.9, 0.95))
    rows = {
        "similarity_to_train": to_train[:, 0],
        "similarity_to_heldout": None if to_heldout is None else to_heldout[:, 0],
        "l2_ratio": ratios,
        "p_value": p,
        "score_normalized": normalized,
    }
    return {
        "n_generated": len(generated),
        "search": {"method": found.method, "recall": found.recall, "recall_measured_on": found.sampled},
        "similarity_to_train": _similarities(to_train[:, 0]),
        "similarity_to_heldout": None if to_heldout is None else _similarities(to_heldout[:, 0]),
        **share,
        "share_above_threshold_heldout": _above(to_heldout, references),
        **_excess(generated, clusters, references),
        "copied_share": copied(share["share_above_threshold"], share["effective_images"], references, references.confidence),
        "discoveries": _discoveries(p, references),
        "seeds": _seeds(to_train[:, 0], runs, references),
        "legacy_shares": metrics.legacy_shares(to_train[:, 0], legacy),
        "score_normalized": _normalized_figures(normalized, references),
        "authpct": _authpct(to_train[:, 0], neighbours[:, 0], train),
        "c_t": _c_t(generated, to_train[:, 0], references),
        "mann_whitney_z": None if references.null is None else metrics.mann_whitney_z(to_train[:, 0], references.null),
        "l2_ratio": {"k": to_train.shape[1], "alpha": 0.5, "quantiles": metrics.nn_quantiles(ratios)},
        "d1_over_d2": _d1_over_d2(to_train),
        "fd_pixels": _frechet(pooled, references.heldout_pooled),
        "fd_embedding": _frechet(generated, heldout),
        **_quality(generated, heldout),
        "clip_score": clip,
        "most_copied": _most_copied(generated, train, to_train[:, 0], neighbours[:, 0], references),
        "excluded": generated.images.excluded,
        "images": _images(generated, train, neighbours[:, 0], rows),
    }


def share_figures(generated: Embedded, references: References) -> dict:
    """Of :func:`sampler_figures` the copied share and its excess alone, with the similarities to the training set."""
    clusters, to_train = prompts_of(generated), nearest(generated.embeddings, references.train.embeddings, 1)[0][:, 0]
    return {
        "n_generated": len(generated),
        "similarity_to_train": _similarities(to_train),
        **_share(to_train, references, clusters),
        **_excess(generated, clusters, references),
    }


def _above(to_heldout: np.ndarray | None, references: References) -> float | None:
    if to_heldout is None or references.threshold is None:
        return None
    return metrics.share_above(to_heldout[:, 0], references.threshold)


def _normalized(to_train: np.ndarray, to_heldout: np.ndarray | None) -> np.ndarray | None:
    """Similarities less the mean of the nearest held-out images'; None without enough of those."""
    if to_heldout is None or to_heldout.shape[1] < BACKGROUND:
        return None
    return metrics.score_normalization(to_train, to_heldout, BACKGROUND)


def _normalized_figures(values: np.ndarray | None, references: References) -> dict | None:
    if values is None:
        return None
    level = references.normalized_threshold
    return {
        "k": BACKGROUND,
        "quantiles": metrics.nn_quantiles(values),
        "threshold": level,
        "share_above_threshold": None if level is None else metrics.share_above(values, level),
    }


def _seeds(to_train: np.ndarray, runs: list[int] | None, references: References) -> list[dict] | None:
    """The figures of each seed by itself, where there is more than one."""
    if runs is None or len(set(runs)) < 2:
        return None
    found = []
    for seed in sorted(set(runs)):
        values = to_train[np.array(runs) == seed]
        above = None if references.threshold is None else metrics.share_above(values, references.threshold)
        found.append({"seed": seed, "n": len(values), "share_above_threshold": above, "median": float(np.median(values))})
    return found


def _d1_over_d2(to_train: np.ndarray) -> dict | None:
    if to_train.shape[1] < 2:
        return None
    values = metrics.d1_over_d2(metrics.distance_of(to_train))
    return {"quantiles": metrics.nn_quantiles(values), "share_below_third": float(np.mean(values < 1 / 3))}


def _excess(generated: Embedded, clusters: np.ndarray, references: References) -> dict:
    """Excess over held-out images at equal set sizes, with its cluster bootstrap; the larger set is thinned evenly, in
    the order of its paths."""
    train, heldout = references.train, references.heldout
    names = ("excess_over_heldout", "excess_interval", "excess_set_size", "share_above_threshold_as_many_heldout")
    if heldout is None or references.threshold is None:
        return dict.fromkeys(names)
    size = min(len(train), len(heldout))
    above = [
        nearest(generated.embeddings, some.thinned(size).embeddings, 1)[0][:, 0] > references.threshold
        for some in (train, heldout)
    ]
    interval = cluster_bootstrap(above[0].astype(float) - above[1], clusters, confidence=references.confidence)
    excess = float(above[0].mean() - above[1].mean())
    return dict(zip(names, (excess, list(interval), size, float(above[1].mean())), strict=True))


def _frechet(one: Embedded | None, other: Embedded | None) -> float | None:
    if one is None or other is None or len(one) < 2 or len(other) < 2:
        return None
    return metrics.frechet_distance(one.thinned(FRECHET_MOST).features, other.thinned(FRECHET_MOST).features)


def _authpct(to_train: np.ndarray, neighbours: np.ndarray, train: Embedded) -> float | None:
    """AuthPct between normalised embeddings, from the neighbours that are known already."""
    if len(train) < 2:
        return None
    wanted, which = np.unique(neighbours, return_inverse=True)
    # Of the two training images nearest to t*, one is t* itself or, just as near, a duplicate.
    other = nearest(train.embeddings[wanted], train.embeddings, 2)[0].min(axis=1)
    return metrics.authpct_of_distances(metrics.distance_of(to_train), metrics.distance_of(other)[which])


def _c_t(generated: Embedded, to_train: np.ndarray, references: References) -> dict | None:
    """C_T over as many cells as leave about 60 generated images to each; None below 20 images, where it is not defined."""
    if references.heldout is None:
        return None
    train = references.train.thinned(QUALITY_MOST).embeddings
    cells = max(1, min(10, len(generated) // 60, len(train) // 2))
    distances = [metrics.distance_of(values) for values in (to_train, references.null)]
    try:
        value = metrics.c_t(generated.embeddings, references.heldout.embeddings, train, cells=cells, to_train=distances)
    except ValueError:
        return None
    return {"value": value, "cells": cells}


def _quality(generated: Embedded, heldout: Embedded | None) -> dict:
    """KID, PRDC (k = 5) against H and the Vendi score, in the embedder; None where there are too few images for one."""
    one = generated.thinned(QUALITY_MOST).features
    other = one[:0] if heldout is None else heldout.thinned(QUALITY_MOST).features
    enough, some = min(len(one), len(other)), np.linalg.norm(one, axis=1) > 0
    return {
        "kid": metrics.kid(one, other) if enough > 1 else None,
        "prdc": metrics.prdc(other, one) if enough > 5 else None,
        "vendi": metrics.vendi_score(one[some]) if some.any() else None,
        "quality_images": [len(one), len(other)],
    }


def _most_copied(
    generated: Embedded, train: Embedded, to_train: np.ndarray, neighbours: np.ndarray, references: References
) -> list[dict]:
    """Training images by how many generated ones lie above the threshold beside them, then by how many they are nearest
    to."""
    found = []
    for j in np.unique(neighbours):
        rows = np.flatnonzero(neighbours == j)
        best = rows[np.argmax(to_train[rows])]
        above = None if references.threshold is None else int(np.sum(to_train[rows] > references.threshold))
        found.append(
            {
                "file": train.images.name(int(j)),
                "caption": train.images.records[int(j)].caption,
                "nearest_of": len(rows),
                "above_threshold": above,
                "highest": _round(to_train[best]),
                "generated": generated.images.name(int(best)),
            }
        )
    found.sort(key=lambda row: (-(row["above_threshold"] or 0), -row["nearest_of"], -row["highest"], row["file"]))
    return found[:COPIED_MOST]


def _round(value) -> float:
    return round(float(value), 6)


def _rounded(values) -> list[float]:
    return [_round(v) for v in values]


def _images(generated: Embedded, train: Embedded, neighbours: np.ndarray, columns: dict) -> list[dict]:
    """One entry per image, in the order of the files."""
    rows = []
    for i, record in enumerate(generated.images.records):
        j = int(neighbours[i])
        rows.append(
            {
                "file": generated.images.name(i),
                "prompt": record.caption,
                "nearest_train": train.images.name(j),
                "nearest_train_caption": train.images.records[j].caption,
                **{name: None if values is None else _round(values[i]) for name, values in columns.items()},
            }
        )
    return rows
