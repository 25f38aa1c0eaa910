"""Two sets of embeddings → the report's figures of fidelity and variety."""

from __future__ import annotations

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.quality import FRECHET_MOST, QUALITY_MOST
from eval.schema import QualityFigures


def frechet(one: Embedded | None, other: Embedded | None) -> float | None:
    """Fréchet distance of two sets, of their features as the embedder gave them; None below two images."""
    if one is None or other is None or len(one) < 2 or len(other) < 2:
        return None
    return metrics.frechet_distance(one.thinned(FRECHET_MOST).features, other.thinned(FRECHET_MOST).features)


def quality_figures(generated: Embedded, heldout: Embedded | None) -> QualityFigures:
    """KID, PRDC (k = 5) against H and the Vendi score, in the embedder; None where there are too few images for one."""
    one = generated.thinned(QUALITY_MOST).features
    other = one[:0] if heldout is None else heldout.thinned(QUALITY_MOST).features
    enough, with_direction = min(len(one), len(other)), np.linalg.norm(one, axis=1) > 0
    return {
        "kid": metrics.kid(one, other) if enough > 1 else None,
        "prdc": metrics.prdc(other, one) if enough > 5 else None,
        "vendi": metrics.vendi_score(one[with_direction]) if with_direction.any() else None,
        "quality_images": [len(one), len(other)],
    }
