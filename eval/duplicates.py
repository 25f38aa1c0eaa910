"""Near-duplicates within a set and across two: the same picture at another size, recompressed, or mirrored.

Two training images that are one picture make ratios of nearest distances look harmless, and a held-out image that shows a
training image raises the threshold until nothing is found. Files of equal bytes are found before
(:func:`eval.images.drop_duplicates`).

Pictures are near-duplicates where :mod:`sdxl_ambient.images.duplicates` says so by perceptual hashes, or where an embedder
finds them as near to each other as a JPEG copy is to its original. Merely similar held-out images stay: without them the
threshold would be too low.
"""

from __future__ import annotations

import numpy as np

from eval.images import ImageSet
from eval.neighbours import search
from sdxl_ambient.images.duplicates import Fingerprints, fingerprint, matches

__all__ = ["Fingerprints", "drop_near_duplicates", "drop_near_embeddings", "fingerprint", "jpeg_limit", "matches"]

# Of JPEG copies' similarities to their originals, the quantile from which a pair counts as one picture, and what that is at
# least: an embedder that JPEG confuses must not take unlike pictures out of the null.
JPEG_QUANTILE, JPEG_LEAST = 0.5, 0.95


def drop_near_duplicates(
    images: ImageSet, own: Fingerprints, others: ImageSet | None = None, theirs: Fingerprints | None = None
) -> ImageSet:
    """Leave out near-duplicates of an earlier image of the set, or of any of ``others``; each is listed with its twin."""
    reasons: dict[int, str] = {}

    def note(i: int, name: str, mirrored: bool) -> None:
        reasons.setdefault(i, f"near-duplicate of {name}{' (mirrored)' if mirrored else ''}")

    if others is not None and theirs is not None:
        for i, j, mirrored in matches(own, theirs):
            note(i, f"{others.name(j)} of {others.folder}", mirrored)
    for i, j, mirrored in matches(own, own):
        if j < i and j not in reasons:
            note(i, images.name(j), mirrored)
    return _without(images, reasons)


def drop_near_embeddings(
    images: ImageSet,
    embeddings: np.ndarray,
    least: float,
    others: ImageSet | None = None,
    theirs: np.ndarray | None = None,
) -> ImageSet:
    """Leave out images that an embedder finds at least ``least`` similar to an earlier one, or to any of ``others``.

    Only the nearest neighbour of each is looked at. Embeddings (n, d) are L2-normalised.
    """
    reasons: dict[int, str] = {}
    if others is not None and theirs is not None:
        nearest = search(embeddings, theirs, 1)
        for i in np.flatnonzero(nearest.similarities[:, 0] >= least):
            name = f"{others.name(int(nearest.indices[i, 0]))} of {others.folder}"
            reasons[int(i)] = _as_near(name, nearest.similarities[i, 0])
    if len(images) > 1:
        nearest = search(embeddings, embeddings, 1, leave_one_out=True)
        for i in np.flatnonzero(nearest.similarities[:, 0] >= least):
            j = int(nearest.indices[i, 0])
            if j < i and j not in reasons:
                reasons.setdefault(int(i), _as_near(images.name(j), nearest.similarities[i, 0]))
    return _without(images, reasons)


def jpeg_limit(similarities: np.ndarray) -> float:
    """From JPEG copies' similarities to their originals, how similar two images must be to count as one picture."""
    return max(JPEG_LEAST, float(np.quantile(similarities, JPEG_QUANTILE)))


def _as_near(name: str, similarity: float) -> str:
    return f"near-duplicate of {name} (similarity {similarity:.4f}, as near as a JPEG copy)"


def _without(images: ImageSet, reasons: dict[int, str]) -> ImageSet:
    kept = [i for i in range(len(images)) if i not in reasons]
    return images.subset(kept, [{"file": images.name(i), "reason": reason} for i, reason in sorted(reasons.items())])
