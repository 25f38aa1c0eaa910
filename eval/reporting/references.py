"""What generated images are compared with: both sets of real images, the null and the threshold that it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.neighbours import nearest
from eval.schema import ThresholdFigures
from eval.statistics.calibrate import InsufficientData, smallest_null, threshold

BACKGROUND = 2  # k of the score normalisation


@dataclass
class ReferenceSets:
    """The real images, embedded.

    Attributes:
        train, heldout: in the report's embedder. No held-out set: None.
        train_pooled, heldout_pooled: pooled pixels; None where no Fréchet distance of them is wanted.
    """

    train: Embedded
    heldout: Embedded | None
    train_pooled: Embedded | None
    heldout_pooled: Embedded | None


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
) -> References:
    """Calibrate on the held-out images, or without them on the base model's (``base``), or note why that is refused."""
    train, heldout = sets.train, sets.heldout
    null_from, images = ("heldout", heldout) if heldout else ("base", base) if base else (None, None)
    null = nearest(images.embeddings, train.embeddings, 1)[0][:, 0] if images else None
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
    )
    if heldout and null is not None and len(heldout) > BACKGROUND:
        background = nearest(heldout.embeddings, heldout.embeddings, BACKGROUND, leave_one_out=True)[0]
        normalized = metrics.score_normalization(null, background, BACKGROUND)
        references.normalized_threshold, _ = _calibrated(normalized, alpha)
    return references


def _calibrated(null: np.ndarray, alpha: float) -> tuple[float | None, str | None]:
    """The threshold, or why there is none."""
    try:
        return threshold(null, alpha), None
    except InsufficientData as error:
        return None, str(error)


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
        "refusal": references.refusal,
    }
