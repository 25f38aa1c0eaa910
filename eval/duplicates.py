"""Near-duplicates within a set and across two: the same picture at another size, recompressed, or mirrored.

Two training images that are one picture make ratios of nearest distances look harmless, and a held-out image that shows a
training image raises the threshold until nothing is found. Files of equal bytes are found before
(:func:`eval.images.drop_duplicates`).

Pictures are near-duplicates where the perceptual hashes (64-bit DCT hash of the ``imagehash`` library) of the two, or of
one and the other's mirror image, differ in at most 4 bits and their 8×8 colour thumbnails in the same orientation differ
by at most .05 on average (the hash alone is blind to colour); or where an embedder finds them as near to each other as a
JPEG copy is to its original. Merely similar held-out images stay: without them the threshold would be too low.
"""

from __future__ import annotations

from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image, ImageOps

from eval.images import ImageSet
from eval.neighbours import search

BITS, COLOUR = 4, 0.05
# Of JPEG copies' similarities to their originals, the quantile from which a pair counts as one picture, and what that is at
# least: an embedder that JPEG confuses must not take unlike pictures out of the null.
JPEG_QUANTILE, JPEG_LEAST = 0.5, 0.95
_SIDE, _HASH = 3 * 8 * 8, 8


def fingerprint(image: Image.Image) -> np.ndarray:
    """Hash and thumbnail of an RGB picture and of its mirror image, as 400 bytes in float32."""
    parts = []
    for view in (image, ImageOps.mirror(image)):
        parts.append(np.frombuffer(int(str(imagehash.phash(view)), 16).to_bytes(_HASH, "big"), np.uint8))
        parts.append(np.asarray(view.resize((8, 8), Image.Resampling.BOX)).ravel())
    return np.concatenate(parts).astype(np.float32)


@dataclass
class Fingerprints:
    """Of n images: hashes (n, 2) uint64 and thumbnails (n, 2, 192) in [0, 1], as they stand and mirrored."""

    hashes: np.ndarray
    thumbnails: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Fingerprints:
        """From :func:`fingerprint` of each image: (n, 400). Whole numbers to float32's rounding, as a cache returns them."""
        both = np.rint(features).astype(np.uint8).reshape(len(features), 2, _HASH + _SIDE)
        hashes = np.ascontiguousarray(both[:, :, :_HASH]).view(">u8")[:, :, 0].astype(np.uint64)
        return cls(hashes, both[:, :, _HASH:].astype(np.float32) / 255)


def matches(queries: Fingerprints, references: Fingerprints, pairs: int = 1 << 24) -> list[tuple[int, int, bool]]:
    """Near-duplicate pairs (i, j, mirrored), i an image of ``queries`` and j of ``references``, in that order.

    Compares ``pairs`` of them at once, which bounds memory: 16 bytes for each.
    """
    found, chunk = set(), max(1, pairs // max(1, len(references.hashes)))
    for start in range(0, len(queries.hashes), chunk):
        rows = slice(start, start + chunk)
        for side in (0, 1):
            differing = np.bitwise_count(queries.hashes[rows, side, None] ^ references.hashes[None, :, 0])
            for a, b in zip(*np.nonzero(differing <= BITS), strict=True):
                gap = np.abs(queries.thumbnails[start + a, side] - references.thumbnails[b, 0]).mean()
                if gap <= COLOUR:
                    found.add((start + int(a), int(b), bool(side)))
    return sorted(found)


def drop_near_duplicates(
    images: ImageSet, own: Fingerprints, others: ImageSet | None = None, theirs: Fingerprints | None = None
) -> ImageSet:
    """Leave out near-duplicates of an earlier image of the set, or of any of ``others``; each is listed with its twin."""
    reasons: dict[int, str] = {}

    def note(i: int, name: str, mirrored: bool) -> None:
        reasons.setdefault(i, f"near-duplicate of {name}{' (mirrored)' if mirrored else ''}")

    for i, j, mirrored in matches(own, theirs) if others is not None else []:
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
    if others is not None:
        found = search(embeddings, theirs, 1)
        for i in np.flatnonzero(found.similarities[:, 0] >= least):
            name = f"{others.name(int(found.indices[i, 0]))} of {others.folder}"
            reasons[int(i)] = _as_near(name, found.similarities[i, 0])
    if len(images) > 1:
        found = search(embeddings, embeddings, 1, leave_one_out=True)
        for i in np.flatnonzero(found.similarities[:, 0] >= least):
            j = int(found.indices[i, 0])
            if j < i and j not in reasons:
                reasons.setdefault(int(i), _as_near(images.name(j), found.similarities[i, 0]))
    return _without(images, reasons)


def jpeg_limit(similarities: np.ndarray) -> float:
    """From JPEG copies' similarities to their originals, how similar two images must be to count as one picture."""
    return max(JPEG_LEAST, float(np.quantile(similarities, JPEG_QUANTILE)))


def _as_near(name: str, similarity: float) -> str:
    return f"near-duplicate of {name} (similarity {similarity:.4f}, as near as a JPEG copy)"


def _without(images: ImageSet, reasons: dict[int, str]) -> ImageSet:
    kept = [i for i in range(len(images)) if i not in reasons]
    return images.subset(kept, [{"file": images.name(i), "reason": reason} for i, reason in sorted(reasons.items())])
