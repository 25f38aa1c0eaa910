"""What generated images are compared with: both sets of real images, the null and the threshold that it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.found import KnownPictures
from eval.neighbours import nearest
from eval.parts import Parts
from eval.schema import ThresholdFigures
from eval.statistics.calibrate import InsufficientData, smallest_null, threshold
from eval.statistics.two_sample import energy_p_value

BACKGROUND = 2  # k of the score normalisation
# What a verdict that clears a model must have been able to see, and how much of it.
MUST_SEE = ("copy", "jpeg", "blur", "flip", "crop", "fit", "vae")
LEAST_RECALL = 0.8
SUSPECT_QUANTILE = 0.05


@dataclass
class ReferenceSets:
    """The real images, embedded.

    Attributes:
        train, heldout: in the report's embedder. No held-out set: None.
        train_pooled, heldout_pooled: pooled pixels; None where no Fréchet distance of them is wanted.
        views: embeddings (n, d) of the training images seen otherwise, in the order of ``train``; see :mod:`eval.views`.
        as_sampled: the held-out images in the shape of the samples; None where that is theirs.
    """

    train: Embedded
    heldout: Embedded | None
    train_pooled: Embedded | None
    heldout_pooled: Embedded | None
    views: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    as_sampled: Embedded | None = field(default=None, kw_only=True)

    def nearest_in_train(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The similarity (m,) of each query (m, d) to the nearest training image, seen in any way, and its index (m,)."""
        similarities, indices = (column[:, 0] for column in nearest(queries, self.train.embeddings, 1))
        return self.with_views(queries, similarities, indices)

    def with_views(
        self, queries: np.ndarray, similarities: np.ndarray, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the nearest training images as they are give, (m,), bettered by the other views."""
        for embeddings in self.views.values():
            others, places = (column[:, 0] for column in nearest(queries, embeddings, 1))
            indices = np.where(others > similarities, places, indices)
            similarities = np.maximum(similarities, others)
        return similarities, indices


@dataclass
class References(ReferenceSets):
    """The sets that generated images are compared with, and the threshold that the null gives.

    Attributes:
        alpha: the false-alarm rate that the threshold is made for.
        confidence: of the intervals.
        null: similarities to the nearest training image, shape (n,), of images that were not trained on: the held-out ones,
            or without them the base model's (``null_from`` is "heldout" or "base"); None without either.
        threshold: τ_α, or None with ``refusal`` saying why.
        embedder: its name.
        planted: similarities of known copies by what was done to them; ``recall_control`` names those whose recall the
            copied share is corrected by.
        normalized_threshold: τ_α of the score-normalised similarities, where they exist.
        known: the training pictures by bytes, pixels and fingerprint; None where copies aren't looked for in that way.
        parts: which images show a part of a training picture; None where that wasn't looked for.
    """

    alpha: float
    confidence: float
    null: np.ndarray | None
    null_from: str | None
    threshold: float | None
    refusal: str | None
    embedder: str = "pixel"
    planted: dict[str, np.ndarray] = field(default_factory=dict)
    normalized_threshold: float | None = None
    known: KnownPictures | None = None
    parts: Parts | None = None

    @property
    def false_alarms(self) -> float:
        """The share of unrelated images that count as copies, at most: by similarity, or by a part."""
        return self.alpha + (self.parts.false_alarms if self.parts else 0.0)

    @property
    def must_see(self) -> list[str]:
        """The planted changes that the threshold must find if finding nothing is to mean anything."""
        return [name for name in self.planted if name in MUST_SEE]

    def recall(self, name: str) -> float:
        """The share of a planted change that lies above the threshold, which there must be."""
        return float(self.recalled(name).mean())

    def recalled(self, name: str) -> np.ndarray:
        """Which planted copies are found (n,) bool: by similarity, or by a part where those were looked for, in some of
        them. There must be a threshold."""
        assert self.threshold is not None
        similar = self.planted[name] > self.threshold
        if self.parts is None or name not in self.parts.planted:
            return similar
        rows, inliers = self.parts.planted[name]
        return similar[rows] | (inliers > self.parts.limit)

    @property
    def blind_to(self) -> list[str]:
        """The changes on the must-see list of which too few are found, the least found first; [] without a threshold."""
        if self.threshold is None:
            return []
        recalls = {name: self.recall(name) for name in self.must_see}
        return sorted((name for name, value in recalls.items() if value < LEAST_RECALL), key=recalls.__getitem__)

    @property
    def suspects(self) -> np.ndarray:
        """Indices of the null's images that are as near to a training image as known copies are: frames of one burst, say.

        As near as all but a twentieth of the planted copies on the must-see list.
        """
        if self.null is None or not self.must_see or self.null_from != "heldout":
            return np.empty(0, np.intp)
        least = np.quantile(np.concatenate([self.planted[name] for name in self.must_see]), SUSPECT_QUANTILE)
        return np.flatnonzero(self.null >= least)

    @property
    def rests_on_suspects(self) -> bool:
        """Whether such images alone set the threshold, under which copies like them can hide."""
        return self.null is not None and len(self.suspects) > self.alpha * len(self.null)

    @property
    def recall_control(self) -> str | None:
        """The control that is most like what a generated copy went through: the model's VAE, else JPEG."""
        return next((name for name in ("vae", "jpeg") if name in self.planted), None)


def make_references(
    sets: ReferenceSets,
    alpha: float,
    confidence: float,
    embedder: str,
    planted: dict[str, np.ndarray],
    base: Embedded | None = None,
    known: KnownPictures | None = None,
) -> References:
    """Calibrate on the held-out images, or without them on the base model's (``base``), or note why that is refused."""
    train, heldout = sets.train, sets.heldout
    null_from, images = ("heldout", heldout) if heldout else ("base", base) if base else (None, None)
    queries = sets.as_sampled if null_from == "heldout" and sets.as_sampled else images
    null = sets.nearest_in_train(queries.embeddings)[0] if queries else None
    value, refusal = None, "neither held-out images nor the base model's are there to compare with"
    if null is not None:
        value, refusal = _calibrated(null, alpha)
        if refusal and null_from == "base":
            refusal = refusal.replace("held-out images", "images of the base model")
    references = References(
        train=train,
        heldout=heldout,
        train_pooled=sets.train_pooled,
        heldout_pooled=sets.heldout_pooled,
        alpha=alpha,
        confidence=confidence,
        null=null,
        null_from=null_from,
        threshold=value,
        refusal=refusal,
        embedder=embedder,
        planted=planted,
        known=known,
        views=sets.views,
        as_sampled=sets.as_sampled,
    )
    if heldout and null is not None and len(heldout) > BACKGROUND:
        background = nearest(heldout.embeddings, heldout.embeddings, BACKGROUND, leave_one_out=True)[0]
        plain = nearest(heldout.embeddings, train.embeddings, 1)[0][:, 0]
        normalized = metrics.score_normalization(plain, background, BACKGROUND)
        references.normalized_threshold, _ = _calibrated(normalized, alpha)
    return references


def _calibrated(null: np.ndarray, alpha: float) -> tuple[float | None, str | None]:
    """The threshold, or why there is none."""
    try:
        return threshold(null, alpha), None
    except InsufficientData as error:
        return None, str(error)


def source_p_value(references: ReferenceSets) -> float | None:
    """The p-value of the test that the held-out images come from the training set's source; None without held-out images.

    A permutation test of the energy distance of the embeddings, of at most 500 of each set; see
    :func:`eval.statistics.two_sample.energy_p_value`.
    """
    if references.heldout is None:
        return None
    return energy_p_value(references.train.embeddings, references.heldout.embeddings)


def threshold_figures(references: References) -> ThresholdFigures:
    """The report's section on the threshold."""
    return {
        "value": references.threshold,
        "null": references.null_from,
        "normalized_value": references.normalized_threshold,
        "alpha": references.alpha,
        "confidence": references.confidence,
        "n_heldout": len(references.heldout) if references.heldout else 0,
        "n_null": 0 if references.null is None else len(references.null),
        "n_heldout_needed": smallest_null(references.alpha),
        "source_p_value": source_p_value(references),
        "refusal": references.refusal,
        "local_false_alarms": references.parts.false_alarms if references.parts else 0.0,
        "local_copies_missing": references.parts.missing if references.parts else None,
    }
